"""Jobs for the tests of the runner, where a process that is begun anew can import them."""

import os
import signal
import time
from pathlib import Path

from stablemask.errors import InputError
from studies.study import Claim, Job, Section, Study


def square(work: Path, *, number: int) -> dict:
    print("squaring", number)
    with (work / "squared.txt").open("a") as log:
        log.write(f"{number}\n")
    return {"square": number**2}


def refuse(work: Path, *, number: int) -> dict:
    raise InputError(f"{number} is not wanted")


def die(work: Path) -> dict:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def wait(work: Path, *, number: int) -> dict:
    """Until it is stopped, the second time not at all."""
    (work / f"begun-{number}").touch()
    try:
        while not (work / f"stopped-{number}").exists():
            time.sleep(0.05)
    except KeyboardInterrupt:
        (work / f"stopped-{number}").touch()
        raise
    return {"number": number}


def study_of(*jobs: Job, name: str = "squares") -> Study:
    def section(records: list[dict]) -> Section:
        total = sum(record["square"] for record in records)
        verdict = "reproduced" if total == 14 else "not reproduced"
        return Section([Claim("1 + 4 + 9 = 14", f"sum {total}", verdict)], f"The sum is {total}.")

    return Study(name, "Squares", lambda scale, seeds: list(jobs), section)


def squares(*numbers: int) -> list[Job]:
    return [Job(f"square-{n}", square, {"number": n}) for n in numbers]


def waiting(number: int) -> Job:
    return Job(f"wait-{number}", wait, {"number": number})
