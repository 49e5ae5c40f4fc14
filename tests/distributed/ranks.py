"""Processes that run a test's function together over gloo, started once for all tests of a size."""

import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ..processes import context

START_SECONDS = 90
CALL_SECONDS = 40
_COLLECTIVE = timedelta(seconds=20)


class Ranks:
    """``size`` processes with a process group; a rank that fails or hangs fails the call, and all end."""

    def __init__(self, size: int, store: str):
        self.size = size
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, store, theirs), name=f"rank {rank}", daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._wait(START_SECONDS)

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def run(self, function: Callable[..., None], *args: Any) -> None:
        """Call a module-level function on every rank, after ``manual_seed(0)``."""
        for pipe in self._pipes:
            pipe.send((function, args))
        self._wait(CALL_SECONDS)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        failures = []
        for rank, pipe in enumerate(self._pipes):
            try:
                if not pipe.poll(max(0.0, deadline - time.monotonic())):
                    failures.append(f"rank {rank}: no answer within {seconds} seconds")
                elif (failure := pipe.recv()) is not None:
                    failures.append(f"rank {rank}: {failure}")
                    # The others may wait for this one.
                    deadline = min(deadline, time.monotonic() + 1)
            except EOFError:
                failures.append(f"rank {rank}: died")
        if failures:
            self.stop()
            raise AssertionError("\n".join(failures))

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(10)


def _serve(rank: int, size: int, store: str, pipe: Any) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=_COLLECTIVE
        )
        pipe.send(None)
        while True:
            function, args = pipe.recv()
            torch.manual_seed(0)
            function(*args)
            pipe.send(None)
    except EOFError:
        pass
    except BaseException:
        pipe.send(traceback.format_exc())
