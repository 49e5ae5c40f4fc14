"""Jobs for the tests of the runner, where a process that is begun anew can import them."""

import os
import signal
import time
from pathlib import Path

from benchmarks.tables import records_table
from stablemask.errors import InputError
from studies.study import Claim, Job, Section, Study


def square(work: Path, *, number: int) -> dict:
    print("squaring", number)
    with (work / "squared.txt").open("a") as log:
        log.write(f"{number}\n")
    return {"square": number**2}


def add(work: Path, *, number: int, before: list[dict]) -> dict:
    return {"square": number + sum(record["square"] for record in before)}


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
        claims = [Claim("1 + 4 + 9 = 14", [total == 14, total == 14])]
        numbers = records_table(records, [("number", "{number}"), ("square", "{square}")])
        return Section(claims, {"numbers": numbers}, facts={"total": total})

    text = (
        "The sum is {{ total }}.\n\n{{ tables.numbers }}\n\n{{ claims }}\n\n"
        "As I said: {{ verdict('1 + 4') }}."
    )
    return Study(name, "All squares", lambda scale, seeds: list(jobs), section, text)


def squares(*numbers: int) -> list[Job]:
    return [Job(f"square-{n}", square, {"number": n}) for n in numbers]


def waiting(number: int) -> Job:
    return Job(f"wait-{number}", wait, {"number": number})
