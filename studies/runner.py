"""Runs the jobs of studies in processes of their own, and goes on with what is done already.

OUT/NAME.json              a study: scale, seeds, hardware, versions, command, and a record of each job; what stands
                           in it is not done again. Of one that stands alone it is written as far as it is done
OUT/work/records/NAME/     the record of each job, written when it is done
OUT/work/models/           what the jobs have trained
OUT/work/jobs-*.log        what they have printed
KEPT/NAME/                 of a study that stands alone: the record of each job again, which is committed
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks.environment import describe, save_json
from stablemask.bars import progress_bar
from stablemask.errors import InputError, RunError
from stablemask.reading import parse_json, read_json

from .study import Job, Record, Study

KEPT = Path(__file__).parent / "results"
# Of the versions, those that a record repeats, for a study may be gone on with by others.
_VERSIONS = ("python", "torch", "transformers")


class Stopped(BaseException):
    """A signal has ended the studies; what was done is stored."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


def run_studies(
    studies: Sequence[Study],
    *,
    scale: str,
    seeds: int,
    workers: int,
    out: Path,
    command: str,
    kept: Path = KEPT,
) -> None:
    """Do all jobs of the studies and write the record of each study as its last job is done, of one that stands alone
    after each job that no other waits for.

    Args:
        workers: processes at a time; on a CPU each computes on one thread, or on ``OMP_NUM_THREADS``.
        kept: where studies that stand alone keep their records for good.

    Raises:
        Stopped: by SIGINT or SIGTERM.
        InputError, RunError: a job could not do its work; those done before are stored.
    """
    queue = [(study, job) for study in studies for job in study.jobs(scale, seeds)]
    written = {study.name: _written(out, study.name) for study in studies}
    done = {
        id(job): _stored(_record_files(out, kept, study, job), written[study.name], job)
        for study, job in queue
    }
    todo = [(study, job) for study, job in queue if done[id(job)] is None]
    about = {"scale": scale, "seeds": seeds, "workers": workers}
    here = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    here["command"] = command

    def finish(study: Study) -> None:
        jobs = [job for of, job in queue if of is study]
        records = [record for job in jobs if (record := done[id(job)]) is not None]
        waited_for = {name for job in jobs for name in job.after}
        ends = any(record["job"] not in waited_for for record in records)
        if len(records) == len(jobs) or (study.alone and ends):
            document = _document(study, {**about, "jobs": len(jobs)} | here, records)
            save_json(document, out / f"{study.name}.json")

    for study in studies:
        finish(study)
    if not todo:
        return
    with (
        _pool(workers, out / "work") as pool,
        _stop_on_signals(pool),
        progress_bar(
            total=sum(job.cost for _, job in queue),
            initial=sum(job.cost for _, job in queue) - sum(job.cost for _, job in todo),
            bar_format="{l_bar}{bar}| [{elapsed}<{remaining}{postfix}]",
        ) as bar,
    ):
        running: dict[Future, tuple[Study, Job]] = {}
        waiting = list(todo)
        failure: InputError | RunError | None = None

        def before(study: Study, job: Job) -> list[Record | None]:
            named = {other.name: done[id(other)] for of, other in queue if of is study}
            return [named[name] for name in job.after]

        while True:
            # No more than can begin at once, so that a stop leaves nothing half begun.
            ready = (pair for pair in waiting if None not in before(*pair))
            while len(running) < workers and (following := next(ready, None)) is not None:
                study, job = following
                waiting.remove(following)
                arguments = dict(job.arguments)
                if job.after:
                    arguments["before"] = before(study, job)
                future = pool.submit(_run, job.run, out / "work", arguments)
                running[future] = following
                ready = (pair for pair in waiting if None not in before(*pair))
                bar.set_postfix_str(f"{study.name} {job.name}")
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                study, job = running.pop(future)
                try:
                    result = _result(future, study, job, out)
                except (InputError, RunError) as error:
                    # Nothing more begins; what runs beside it ends and is kept.
                    failure, waiting = failure or error, []
                    bar.set_postfix_str(f"{study.name} {job.name} failed")
                    continue
                record = {"job": job.name, **job.arguments, **result, **_made_with(here)}
                for path in _record_files(out, kept, study, job):
                    save_json(record, path)
                done[id(job)] = record
                bar.update(job.cost)
                finish(study)
        if failure is not None:
            raise failure


def load_study(out: Path, name: str) -> dict[str, Any] | None:
    """What :func:`run_studies` has written of a study, None where it has not.

    Raises:
        InputError: the file is damaged.
    """
    path = out / f"{name}.json"
    return read_json(path) if os.path.exists(path) else None


def _run(run: Callable[..., Any], work: Path, arguments: dict[str, Any]) -> Record:
    began, computed = time.perf_counter(), time.process_time()
    record = dict(run(work, **arguments))
    seconds = {
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(time.process_time() - computed, 2),
    }
    return record | seconds


def _result(future: Future, study: Study, job: Job, out: Path) -> Record:
    try:
        return future.result()
    except (InputError, RunError) as error:
        raise type(error)(f"{study.name}, {job.name}: {error}") from error
    except BrokenProcessPool as error:
        raise RunError(
            f"the process of {study.name}, {job.name} died, perhaps for want of memory; "
            f"{out / 'work'} holds its log"
        ) from error


@contextmanager
def _pool(workers: int, work: Path) -> Iterator[ProcessPoolExecutor]:
    """Processes that begin anew, with none of this one's threads."""
    work.mkdir(parents=True, exist_ok=True)
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin_worker,
        initargs=(str(work),),
    )
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _stop_on_signals(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Ctrl-C or SIGTERM ends the jobs, which save what they train, and raises :class:`Stopped`."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second one ends this process at once
        for pid in pool._processes or ():
            os.kill(pid, signal.SIGINT)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _begin_worker(work: str) -> None:
    """What a job prints goes to a file; it ends with the process that began it."""
    log = os.open(Path(work) / f"jobs-{os.getpid()}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.setpgid(0, 0)  # Ctrl-C comes from the parent, once
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _record_files(out: Path, kept: Path, study: Study, job: Job) -> list[Path]:
    places = [out / "work" / "records"] + ([kept] if study.alone else [])
    return [place / study.name / f"{job.name}.json" for place in places]


def _written(out: Path, name: str) -> dict[str, Record]:
    """The records of OUT/NAME.json by job, each with what it was made with."""
    try:
        document = load_study(out, name) or {"records": []}
    except InputError:  # written anew
        return {}
    return {record["job"]: _made_with(document) | record for record in document["records"]}


def _made_with(about: dict[str, Any]) -> Record:
    """When, on what and by what: of a study, or of a record in place of its study."""
    versions = about["versions"]
    found = {"date": about["date"], "hardware": about["hardware"]}
    return found | {name: versions[name] for name in _VERSIONS if name in versions}


def _stored(paths: list[Path], written: Mapping[str, Record], job: Job) -> Record | None:
    """The record of a job that was done with these arguments."""
    arguments = json.loads(json.dumps(dict(job.arguments)))
    for record in (*map(_read, paths), written.get(job.name)):
        if record and all(record.get(name) == value for name, value in arguments.items()):
            return record
    return None


def _read(path: Path) -> Record | None:
    try:
        return parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None


def _document(study: Study, about: dict[str, Any], done: list[Record]) -> dict[str, Any]:
    here = _made_with(about)
    # Where a study was gone on with later, or on another machine, all of them.
    made = {
        name: "; ".join(dict.fromkeys(record.get(name) or here[name] for record in done))
        for name in here
    }
    versions = {name: made.pop(name) for name in _VERSIONS if name in made}
    seconds = sum(record["seconds"] for record in done)
    return {
        "study": study.name, **about, **made, "versions": about["versions"] | versions,
        "job_seconds": round(seconds, 1), "records": done,
    }  # fmt: skip
