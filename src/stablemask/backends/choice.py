"""Which backend serves a call: the one that was named, or the first of an order that can."""

import functools
import os

import torch

from ..call import Call
from . import BACKENDS, Backend, flash_attn, hardware
from .calls import constant_while_compiling


def choose(call: Call, name: str) -> Backend:
    """The backend that serves a call.

    Args:
        name: "auto" or a key of ``BACKENDS``.

    Raises:
        ValueError: there is no backend of that name, or it cannot serve the call; says why.
    """
    if name != "auto":
        if name not in BACKENDS:
            raise ValueError(f"backend must be 'auto' or one of {list(BACKENDS)}, got {name!r}")
        reason = BACKENDS[name].unsupported(call)
        if reason:
            raise ValueError(f"backend {name!r} cannot serve this call: {reason}")
        return BACKENDS[name]
    # While it is compiled a length may be a symbol, which must not be asked for.
    one_row = not (call.watched and torch.compiler.is_compiling()) and call.query.shape[2] == 1
    for candidate in order(hardware.kind_of(call.query), one_row):
        backend = BACKENDS[candidate]
        if backend.unsupported(call) is None:
            return backend
    raise AssertionError("blocks, at the end of every order, serves every call")


@constant_while_compiling
def order(device: str, one_row: bool) -> tuple[str, ...]:
    """The backends that "auto" tries, the fastest first.

    On CUDA that is the order of stock attention, with FlashAttention 3 or 4 first where it is installed for a
    device that has it. cuDNN makes a graph for every length of keys, which no step of decoding is worth.
    FlexAttention is taken by name only, for it compiles in the midst of a call; so is the dense definition.

    Args:
        device: type of the device.
        one_row: whether the call is a step of decoding.
    """
    if device == "cpu":
        return "native", "flash", "blocks"
    if device != "cuda":
        return "flash", "blocks"
    names = (
        ("flash", "blocks")
        if one_row or not _stock_prefers_cudnn()
        else ("cudnn", "flash", "blocks")
    )
    return ("flash_attn", *names) if flash_attn.is_ahead() else names


@functools.cache
def _stock_prefers_cudnn() -> bool:
    """As `check_prefer_cudnn_attention` of PyTorch decides, and as its user has switched it."""
    device = torch.device("cuda")
    version = hardware.cudnn_version()
    return (
        version is not None
        and version > 91500
        and hardware.capability(device) in ((9, 0), (10, 0))
        and torch.backends.cuda.cudnn_sdp_enabled()
        and not os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED")
    )
