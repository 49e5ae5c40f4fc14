"""Peak memory of one forward and backward pass: on the CPU in a fresh process that does nothing else."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from .cases import Case, make_inputs
from .rows import Row, all_rows

Value = TypeVar("Value")

# Where there is fork, from a process that has imported PyTorch and computed nothing.
_FRESH = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
_FRESH.set_forkserver_preload([f"{__package__}.rows"])
_MALLOC = "MALLOC_MMAP_THRESHOLD_"

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def can_measure(device: str) -> bool:
    """On the CPU, Linux alone tells the peak of a process."""
    return device != "cpu" or _CLEAR_REFS.exists()


def counts_live(device: str) -> bool:
    """Whether a peak can be told in any process: CUDA's allocator counts what is live, and frees at once."""
    return device == "cuda"


def peak_memory(row: str, case: Case) -> float:
    """MiB above its inputs that a row needs at its peak; on the CPU in a process of its own."""
    if counts_live(case.device):
        return _measure(row, case)
    return in_fresh_process(_measure, row, case)


def in_fresh_process(function: Callable[..., Value], *arguments: Any) -> Value:
    """What a function of a module returns in a process that does nothing else, and gives back what it frees."""
    # Every block from the system and back to it, so that the peak is that of live memory.
    os.environ[_MALLOC] = "65536"
    try:
        with _FRESH.Pool(1) as pool:
            value = pool.apply(_run, (function, arguments))
            pool.close()  # and let it end by itself, or what it locks with would be reported as leaked
            pool.join()
            return value
    finally:
        del os.environ[_MALLOC]


def _run(function: Callable[..., Value], arguments: tuple[Any, ...]) -> Value:
    if _MALLOC not in os.environ:
        raise RuntimeError("other code has started multiprocessing's fork server before this could")
    return function(*arguments)


def _measure(name: str, case: Case) -> float:
    rows = all_rows(case.device)

    def run(row: Row, case: Case) -> tuple:
        inputs = make_inputs(case)
        attend = row.build(case, inputs)
        before = reset_peak(case.device)
        gradients = torch.autograd.grad(attend(), row.leaves(inputs), inputs.grad)
        return peak(case.device) - before, gradients

    # What a first call sets up is not counted; this one is just too long for the ways of short sequences. Ours
    # may take the stock kernel for long ones only, so that is called first in the process of every row.
    short = replace(case, q_len=544, kv_len=544)
    for row in (rows["sdpa"], rows[name]):
        run(row, short)
    return round(run(rows[name], case)[0] / 2**20, 2)


def reset_peak(device: str) -> int:
    """Start to watch for a peak; the bytes in use now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    _CLEAR_REFS.write_text("5")  # resets the peak, proc(5)
    return _kib("VmRSS") * 1024


def peak(device: str) -> int:
    """Bytes in use at the peak since the last :func:`reset_peak`."""
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _kib("VmHWM") * 1024


def _kib(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise KeyError(name)
