"""What computes a tensor: asked here alone, so that tests can stand in for a GPU that is not there."""

import functools
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .calls import constant_while_compiling


def kind_of(tensor: Tensor) -> str:
    """``"cpu"``, ``"cuda"``, or another type of device."""
    return "cpu" if tensor.is_cpu else tensor.device.type  # the former is read at once


def is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, in which nothing may be read by the host, nor copied from it."""
    return kind_of(tensor) == "cuda" and torch.cuda.is_current_stream_capturing()


def read_later(numbers: Tensor) -> Callable[[], list]:
    """Ask for numbers of a device, which nothing writes to, without waiting for them.

    Returns:
        What gives them as a list. It waits for them alone, and not for what the device was given since.
    """
    on_cuda = kind_of(numbers) == "cuda"
    copy = numbers.detach().to("cpu", non_blocking=on_cuda)  # from CUDA into pinned memory
    copied = torch.cuda.current_stream(numbers.device).record_event() if on_cuda else None

    def read() -> list:
        if copied is not None:
            copied.synchronize()
        return copy.tolist()

    return read


@constant_while_compiling
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, such as (9, 0); (8, 0) where shapes are worked out without one."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (8, 0)


@constant_while_compiling
def cudnn_version() -> int | None:
    """Such as 91900, or None where PyTorch was built without cuDNN."""
    return torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None


@constant_while_compiling
def shared_memory(device: torch.device) -> int:
    """Bytes that one block of a CUDA kernel can have to itself; those of an A100 without a device."""
    if not torch.cuda.is_available():
        return 166912
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 65536)  # ROCm tells of none


@constant_while_compiling
def compiler_problem() -> str | None:
    """What is missing to compile kernels for CUDA here, as PyTorch's compiler does, or None."""
    return _look_for_compiler()


@functools.cache
def _look_for_compiler() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed"
    # Triton compiles what launches its kernels; on Windows it brings a compiler for that.
    named = os.environ.get("CC")
    compilers = [named] if named else ["gcc", "clang"]
    if sys.platform != "win32" and not any(shutil.which(name) for name in compilers):
        return f"Triton needs a C compiler, and there is no {' or '.join(map(repr, compilers))}"
    return None


@functools.cache
def triton_kernels() -> Any:
    """The module of that name; None where Triton is not there, or cannot compile for this GPU."""
    if compiler_problem() is not None:
        return None
    from . import triton_kernels as kernels

    try:
        kernels.check()
    except Exception as error:  # whatever its compiler, its driver or the one of C have to say
        reason = " ".join(str(error).split())[:200]
        warnings.warn(
            f"Triton cannot compile here ({reason}): a sink takes three launches in place of one",
            stacklevel=2,
        )
        return None
    return kernels
