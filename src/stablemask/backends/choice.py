"""Which backend serves a call: the one that was named, or the fastest that can.

"Fastest" is read from ``measured/<device type>.json``, which ``python -m benchmarks backends`` makes: the
measurement nearest in length, of the same device type, dtype and kind of mask, ranks the backends.
What is not measured has ``default_order``. The first in rank that can serve the call does; every rank
holds "blocks", which can serve every call.
"""

import functools
import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from ..call import Call
from ..masks import NO_MASKS, Masks
from . import BACKENDS, Backend, flash_attn, hardware
from .calls import constant_while_compiling, needs_gradient

MEASURED = Path(__file__).with_name("measured")
# Taken by name only. The dense definition keeps every score. FlexAttention has a compiler run for seconds
# in the midst of a call.
_BY_NAME = ("reference", "flex")
# A lead smaller than this is noise on a shared machine, and does not change the default order.
_CLEAR_LEAD = 1.2
# Lengths that stand for all while a function is traced, where they may be symbols.
_COMPILED_LENGTH = 2048

KINDS = ("causal", "mask", "alibi", "window", "documents")
PASSES = ("training", "inference", "decode")


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
    for candidate in _rank_of(call):
        backend = BACKENDS[candidate]
        if backend.unsupported(call) is None:
            return backend
    raise AssertionError("blocks, in every rank, serves every call")


def kind_of(masks: Masks) -> str:
    """The member of ``KINDS`` that decides the speed: what hides most, then what costs most."""
    if masks is NO_MASKS:
        return "causal"
    if masks.documents is not None:
        return "documents"
    if masks.window is not None:
        return "window"
    if masks.alibi_slopes is not None:
        return "alibi"
    return "causal" if masks.attn_mask is None else "mask"


def _rank_of(call: Call) -> tuple[str, ...]:
    query = call.query
    device, dtype, kind = hardware.kind_of(query), query.dtype, kind_of(call.masks)
    training = needs_gradient(call)
    q_len, kv_len = query.shape[2], call.key.shape[2]
    if torch.compiler.is_compiling() or not (type(q_len) is type(kv_len) is int):
        return _rank_while_compiling(device, dtype, kind, training)
    step = "training" if training else "decode" if q_len == 1 else "inference"
    # Powers of two: a repeated call must not cost a search, nor a growing cache one entry a token.
    return rank(device, dtype, kind, step, (q_len - 1).bit_length(), (kv_len - 1).bit_length())[0]


@constant_while_compiling
def _rank_while_compiling(
    device: str, dtype: torch.dtype, kind: str, training: bool
) -> tuple[str, ...]:
    bits = (_COMPILED_LENGTH - 1).bit_length()
    return rank(device, dtype, kind, "training" if training else "inference", bits, bits)[0]


@functools.lru_cache(maxsize=4096)
def rank(
    device: str, dtype: torch.dtype, kind: str, step: str, q_bits: int, kv_bits: int
) -> tuple[tuple[str, ...], bool]:
    """Backends from the fastest on, and whether that was measured.

    Args:
        device: type of the device.
        kind, step: of ``KINDS``, of ``PASSES``.
        q_bits, kv_bits: rows and keys are at most 2 to the power of these.
    """
    order = default_order(device, step)
    rows = [
        row
        for row in _measurements(device)
        if (row["dtype"], row["kind"], row["pass"]) == (_name(dtype), kind, step)
    ]
    if rows:
        nearest = min(
            rows,
            key=lambda row: (
                abs(math.log2(row["q_len"]) - q_bits) + abs(math.log2(row["kv_len"]) - kv_bits),
                -row["kv_len"],  # of two as near the longer, where a wrong choice costs more
            ),
        )
        order = _by_time(nearest["milliseconds"], order)
    return order, bool(rows)


def _by_time(times: dict[str, float], order: tuple[str, ...]) -> tuple[str, ...]:
    names = [name for name in times if name in BACKENDS and name not in _BY_NAME]

    def cost(name: str) -> float:
        return times[name] if name == order[0] else times[name] * _CLEAR_LEAD

    return tuple(dict.fromkeys((*sorted(names, key=cost), *order)))


def default_order(device: str, step: str) -> tuple[str, ...]:
    """The order where nothing was measured.

    On CUDA it is that of stock attention, with FlashAttention 3 or 4 first where it is installed for a
    device that has it. cuDNN makes a graph for every length of keys, which no decoding step is worth.
    FlexAttention is taken by name only: it compiles in the midst of a call.
    """
    if device != "cuda":
        return "flash", "blocks"
    order: tuple[str, ...] = ("flash", "blocks")
    if step != "decode" and _stock_prefers_cudnn():
        order = ("cudnn", *order)
    return ("flash_attn", *order) if flash_attn.is_ahead() else order


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


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def _measurements(device: str) -> list[dict[str, Any]]:
    path = MEASURED / f"{device}.json"
    return json.loads(path.read_text())["measurements"] if path.exists() else []
