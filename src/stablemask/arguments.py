"""The checks of every public function's arguments, in the words of the caller.

Inside, arguments are trusted. While a compiler or an exporter traces, sizes and numbers may be symbols, and
the checks hold of them all the same: they compare, for neither ``in`` nor ``math`` knows a symbol.
"""

import math
import sys
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from .backends.calls import autocast_is_on
from .backends.hardware import kind_of
from .masks import NO_MASKS, Masks

# Eight bits are for weights, which have a scale beside them; a kernel would take them for numbers.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)
INT_END = 2**63  # the first that is too large for a tensor, and for an operator


def check_tensors(query: Tensor, key: Tensor, value: Tensor, past: int | None = None) -> None:
    """Four axes each, dense, floating point, one device, and sizes that fit one another.

    ``past`` is the key at which the first row stands; None for rows that stand on the last keys.
    """
    device = query.device if isinstance(query, Tensor) else None
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must be (batch, heads, length, head_dim), got shape {tuple(tensor.shape)}"
            )
        if tensor.dtype not in FLOATS:
            raise TypeError(
                f"{name} must be floating point, of 16, 32 or 64 bits, got {tensor.dtype}"
            )
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, query on {device}")
    if query.layout != torch.strided:
        raise TypeError(
            f"query must be a dense tensor, got layout {query.layout}; documents of several lengths can "
            "follow each other in one sequence, told apart by `documents`"
        )
    batch, heads, q_len, head_dim = query.shape
    key_batch, kv_heads, kv_len, key_dim = key.shape
    value_batch, value_heads, value_len, _ = value.shape
    if not batch == key_batch == value_batch:
        raise ValueError(
            f"batch differs: query {shown(batch)}, key {shown(key_batch)}, "
            f"value {shown(value_batch)}"
        )
    if key_dim != head_dim:
        raise ValueError(f"head_dim differs: query {shown(head_dim)}, key {shown(key_dim)}")
    if head_dim == 0:
        raise ValueError("head_dim must be at least 1, got 0")
    if kv_heads != value_heads or kv_len != value_len:
        raise ValueError(
            f"key and value must share (kv_heads, kv_len), got {(kv_heads, kv_len)} "
            f"and {(value_heads, value_len)}"
        )
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"kv_heads must divide heads, got {shown(kv_heads)} and {shown(heads)}")
    if past is not None and not is_int(past):
        raise TypeError(f"past must be an int, got {past!r}")
    if past is None and kv_len < q_len:
        raise ValueError(f"kv_len must be at least q_len, got {shown(kv_len)} and {shown(q_len)}")
    stands = past is not None and 0 <= past < INT_END - q_len
    if past is not None and not (stands and (past + q_len <= kv_len or past >= kv_len)):
        raise ValueError(
            f"past must be from 0 to kv_len - q_len = {shown(kv_len - q_len)}, or at least kv_len = "
            f"{shown(kv_len)} and below 2**63 where every row comes after every key, got {shown(past)}"
        )


def check_stock_options(query: Tensor, key: Tensor, is_causal: bool, enable_gqa: bool) -> None:
    """What ``F.scaled_dot_product_attention`` is told of causality and of grouped heads."""
    if is_causal is True and enable_gqa is True:
        return
    for name, option in (("is_causal", is_causal), ("enable_gqa", enable_gqa)):
        if not isinstance(option, (bool, torch.SymBool)):
            raise TypeError(f"{name} must be a bool, got {option!r}")
    heads, kv_heads = query.shape[1], key.shape[1]
    if not (is_causal or query.shape[2] == 1):
        raise ValueError(
            "is_causal must be True, got False: a pseudo mass stands where causality hides keys, so "
            "this attention is always causal. Where attn_mask hides them already, leave is_causal out; "
            "for attention to later keys use torch.nn.functional.scaled_dot_product_attention"
        )
    if not (enable_gqa or heads == kv_heads):
        raise ValueError(
            f"enable_gqa must be True for {shown(heads)} query heads on {shown(kv_heads)} key heads, "
            "got False"
        )


def autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast does for the stock attention: float32 and half inputs take its dtype."""
    device = kind_of(query)
    if autocast_is_on(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (
            tensor if tensor.dtype == torch.float64 else tensor.to(dtype)
            for tensor in (query, key, value)
        )
    if not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"query, key and value must share a dtype, got {query.dtype}, {key.dtype} "
            f"and {value.dtype}"
        )
    return query, key, value


def check_sink(sink_logits: Tensor | float, query: Tensor) -> Tensor | float:
    """Sink logits as a number, or a three-dimensional tensor on the device of query."""
    if isinstance(sink_logits, Tensor) and sink_logits.dtype in FLOATS:
        if sink_logits.device != query.device:
            raise ValueError(f"sink_logits is on {sink_logits.device}, query on {query.device}")
        rows = query.shape[:3]
        if not broadcasts(sink_logits.shape, rows):
            raise ValueError(
                "sink_logits must broadcast to (batch, heads, q_len) = "
                f"{tuple(rows)}, got shape {tuple(sink_logits.shape)}; one per head is (heads, 1)"
            )
        while sink_logits.dim() < 3:
            sink_logits = sink_logits.unsqueeze(0)
        return sink_logits
    if not is_number(sink_logits):
        kind = sink_logits.dtype if isinstance(sink_logits, Tensor) else type(sink_logits).__name__
        raise TypeError(
            f"sink_logits must be a floating-point tensor, of 16, 32 or 64 bits, or a number, got {kind}"
        )
    if sink_logits != sink_logits:
        raise ValueError("sink_logits must be a number or a tensor, got nan")
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if abs(sink_logits) > torch.finfo(dtype).max:  # which no tensor holds
        sink_logits = math.inf if sink_logits > 0 else -math.inf
    return sink_logits


def check_dropout(dropout_p: float) -> None:
    if not is_number(dropout_p):
        raise TypeError(f"dropout_p must be a number, got {dropout_p!r}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {shown(dropout_p)}")


def check_scale(scale: float | None, query: Tensor) -> float:
    """The scale of the scores, ``head_dim ** -0.5`` where None is given."""
    if scale is None:
        return query.shape[-1] ** -0.5
    if not is_number(scale):
        raise TypeError(f"scale must be a number or None, got {scale!r}")
    above_all = isinstance(scale, int) and abs(scale) > sys.float_info.max  # that is no infinity
    if above_all or not -math.inf < scale < math.inf:
        raise ValueError(f"scale must be a finite number, got {shown(scale)}")
    return scale * 1.0  # a float, of an int too


def check_gamma_heads(gamma: float | Tensor, heads: int) -> None:
    """A rate of each head has as many as there are; the rest is for ``pseudo_logsumexp`` to say."""
    if isinstance(gamma, Tensor) and gamma.dim() == 1 and not broadcasts(gamma.shape, (heads,)):
        raise ValueError(
            f"gamma must be a number or a tensor (heads,) = ({heads},), "
            f"got shape {tuple(gamma.shape)}"
        )


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, _NUMBERS) and not isinstance(value, bool)


def is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def shown(value: object) -> object:
    """As an error message shows it; a compiler puts a symbol's value into a string, but no symbol."""
    if is_int(value):
        return int(value)
    return float(value) if is_number(value) else repr(value)


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of one shape can be expanded to another."""
    return len(shape) <= len(to) and all(
        size == whole or size == 1 for size, whole in zip(reversed(shape), reversed(to))
    )


def check_masks(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    window: int | None,
    alibi_slopes: Tensor | None,
    documents: Tensor | None,
) -> Masks:
    if attn_mask is None and window is None and alibi_slopes is None and documents is None:
        return NO_MASKS
    heads, kv_len = query.shape[1], key.shape[2]
    shape = (*query.shape[:3], kv_len)
    for name, tensor in (
        ("attn_mask", attn_mask), ("alibi_slopes", alibi_slopes), ("documents", documents),
    ):  # fmt: skip
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != query.device:
            raise ValueError(f"{name} is on {tensor.device}, query on {query.device}")

    if attn_mask is not None:
        if not broadcasts(attn_mask.shape, shape):
            raise ValueError(
                f"attn_mask must broadcast to (batch, heads, q_len, kv_len) = {shape}, "
                f"got shape {tuple(attn_mask.shape)}"
            )
        if attn_mask.dtype not in (torch.bool, *FLOATS):
            raise TypeError(f"attn_mask must be bool or floating point, got {attn_mask.dtype}")
        attn_mask = attn_mask.reshape((1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape))
        attn_mask = attn_mask.expand(*attn_mask.shape[:-1], kv_len)
    if alibi_slopes is not None and not (
        alibi_slopes.dim() == 1 and alibi_slopes.shape[0] == heads
    ):
        raise ValueError(
            f"alibi_slopes must be (heads,) = ({heads},), got shape {tuple(alibi_slopes.shape)}"
        )
    if window is not None and not (is_int(window) and 1 <= window < INT_END):
        raise ValueError(
            f"window must be an int of at least 1 and below 2**63, or None, got {shown(window)}"
        )
    if documents is not None:
        if documents.dtype.is_floating_point or documents.dtype.is_complex:
            raise TypeError(f"documents must be an integer tensor, got {documents.dtype}")
        if not (
            documents.dim() in (1, 2)
            and documents.shape[-1] == kv_len
            and broadcasts(documents.shape, (shape[0], kv_len))
        ):
            raise ValueError(
                f"documents must be (kv_len,) or (batch, kv_len) = ({shape[0]}, {kv_len}), "
                f"got shape {tuple(documents.shape)}"
            )
        documents = documents.reshape(-1, kv_len)
    return Masks(attn_mask, alibi_slopes, window, documents)
