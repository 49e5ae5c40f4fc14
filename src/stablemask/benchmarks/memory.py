"""Peak memory of one forward and backward pass, in a fresh process that does nothing else."""

import multiprocessing
import os
from pathlib import Path

import torch

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(row: str, length: int, dtype: str, device: torch.device) -> float | None:
    """MiB above the inputs that ``ROWS[row]`` needs at its peak, for one sequence.

    None where the system cannot tell (on the CPU, anything but Linux).
    """
    if device.type == "cpu" and not _CLEAR_REFS.exists():
        return None
    # Every block from the system and back to it, so that the peak is that of live memory.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(_measure, (row, length, dtype, device.type))
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def _measure(row: str, length: int, dtype: str, device_type: str) -> float:
    from .attention import ROWS, make_tensors

    device = torch.device(device_type)
    attend = ROWS[row]

    def run(length: int) -> tuple:
        query, key, value, grad = make_tensors(1, length, getattr(torch, dtype), device)
        before = _reset(device)
        gradients = torch.autograd.grad(attend(query, key, value), (query, key, value), grad)
        return _peak(device) - before, gradients

    run(64)  # what a first call sets up is not counted
    return round(run(length)[0] / 2**20, 2)


def _reset(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    _CLEAR_REFS.write_text("5")  # resets the peak, proc(5)
    return _kib("VmRSS") * 1024


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    return _kib("VmHWM") * 1024


def _kib(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1])
    raise KeyError(name)
