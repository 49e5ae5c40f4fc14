"""The stock attention kernels of PyTorch behind one signature.

    forward(query, key, value, bias, causal, scale) -> out (B, H, n, D), lse (B, H, n)
    backward(grad, query, key, value, out, lse, bias, causal, scale) -> d_query, d_key, d_value

``causal`` is square and aligned top-left; a ``band`` as one more argument, of "cuda" alone, makes it one call of
rows on the last keys (see :class:`~.tiles.Band`); ``bias`` is added to the scaled scores and may be -inf; ``lse`` is
the natural logsumexp of the visible scores, in float32 (float64 for float64 inputs), and -inf, beside an
``out`` of 0, for a row whose every bias is -inf. The backward takes any ``out`` and ``lse``: it rebuilds
``exp(scores - lse)`` and ``rowsum(grad * out)`` from them, which is what ``operators.py`` rests on.

Kernels differ in the layout and padding of lse, in grouped heads, and in what a bias may be; the
differences end in this file. None is called with dropout, so their random states are placeholders.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from .. import native
from ..native.tuning import is_faster
from .tiles import Band

aten = torch.ops.aten
MAX_FLASH_HEAD_DIM = 256  # of FlashAttention on CUDA


@dataclass(frozen=True)
class Kernel:
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _with_blind_rows(out, lse, bias, causal):
    """What a kernel returns, in place; of rows whose every bias is -inf kernels say this and that."""
    seen = bias != -torch.inf
    first = seen.view(torch.uint8).argmax(-1, keepdim=True)  # 0 too where none is seen
    blind = ~seen.gather(-1, first)
    if causal:
        blind = blind | (first > torch.arange(lse.shape[2], device=bias.device).unsqueeze(-1))
    return out.masked_fill_(blind, 0.0), lse.masked_fill_(blind.squeeze(-1), -torch.inf)


def _cpu_forward(query, key, value, bias, causal, scale):
    kv_heads = key.shape[1]
    if query.shape[2] == 1 and kv_heads < query.shape[1] and _reads_keys_once(query, key):
        rows = as_rows_of_key_heads(query, kv_heads)
        bias = None if bias is None else as_rows_of_key_heads(bias, kv_heads)
        out, lse = _cpu_forward(rows, key, value, bias, False, scale)
        return out.reshape(query.shape), lse.reshape(query.shape[:3])
    # By its name in torch, 2 microseconds faster than by that in torch.ops.
    out, lse = torch._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=bias, scale=scale
    )
    if bias is not None and (lse == 0).any():  # as it says of a blind row, and of few others
        return _with_blind_rows(out, lse, bias, causal)
    return out, lse


# Scores of a row from which on fewer reads are worth the few operations that they take.
_MANY_SCORES = 1 << 15


def _reads_keys_once(query: Tensor, key: Tensor) -> bool:
    """Whether a row is faster if the heads that share a key head are its rows, in products of matrices.

    By 1.2 to 2 times in float32. In half precision, whose products of a vector have no vectors here, by 2 to 14. Each
    thread is to have a key head; a compiler is not to ask for lengths.
    """
    batch, kv_heads, kv_len, _ = key.shape
    many = query.dtype.itemsize == 2 or query.shape[1] * kv_len >= _MANY_SCORES
    return (
        many and not torch.compiler.is_compiling() and batch * kv_heads >= torch.get_num_threads()
    )


def _cpu_backward(grad, query, key, value, out, lse, bias, causal, scale):
    if _faster_in_float32(query, key):
        return _cpu_backward_in_float32(grad, query, key, value, out, lse, bias, causal, scale)
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, query, key, value, out, lse, 0.0, causal, attn_mask=bias, scale=scale
    )


# Numbers of a slice of the queries; of fewer, the time of a call would show.
_SLICE = 1 << 17


def _cpu_backward_in_float32(grad, query, key, value, out, lse, bias, causal, scale):
    """By slices of heads, of which every thread has as many, so that little is held in float32 at a time."""
    batch, kv_heads, _, head_dim = key.shape
    numbers_per_head = query.shape[1] // kv_heads * query.shape[2] * head_dim
    threads = torch.get_num_threads()
    busy = math.lcm(threads, kv_heads) if kv_heads % threads else threads
    at_once = busy * max(1, _SLICE // max(busy * numbers_per_head, 1))
    sequences, heads = max(at_once // kv_heads, 1), min(at_once, kv_heads)

    def part(tensor, first, first_head):
        of_head = tensor.shape[1] // kv_heads  # 0 if all have the same
        return tensor[
            slice(first, first + sequences) if tensor.shape[0] > 1 else slice(None),
            slice(of_head * first_head, of_head * (first_head + heads)) if of_head else slice(None),
        ]

    gradients = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
    for start in product(range(0, batch, sequences), range(0, kv_heads, heads)):
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(part(tensor, *start).float() for tensor in (grad, query, key, value, out)),
            part(lse, *start), 0.0, causal,
            attn_mask=None if bias is None else part(bias, *start), scale=scale,
        )  # fmt: skip
        for gradient, of_part in zip(gradients, found, strict=True):
            part(gradient, *start).copy_(of_part)
    return gradients


def _faster_in_float32(query: Tensor, key: Tensor) -> bool:
    """Whether converting everything and back is faster, by 1.1 to 16 times here; docs/lessons.md."""
    return is_faster(native.RULES, "backward_in_float32", query.dtype, key.shape[2])


def aligned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors that CUDA's kernels may read 16 bytes at a time; a slice that begins between is copied."""
    return tuple(
        tensor if _is_aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)
        for tensor in tensors
    )


def _is_aligned(tensor: Tensor) -> bool:
    size = tensor.element_size()
    if any(tensor.stride(axis) * size % 16 for axis in range(tensor.dim() - 1)):
        return False
    # While compiling there is no address yet; a compiler aligns what it makes.
    return torch.compiler.is_compiling() or tensor.is_meta or tensor.data_ptr() % 16 == 0


def _no_random_state(like: Tensor) -> tuple[Tensor, Tensor]:
    state = torch.zeros((), dtype=torch.int64, device=like.device)
    return state, state


def _cuda_forward(query, key, value, bias, causal, scale, band=None):
    query, key, value = aligned(query, key, value)
    if band is not None:
        return _banded_forward(query, key, value, scale, band)
    out, lse, *_ = aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, causal, False, scale=scale
    )
    return out, lse


def _cuda_backward(grad, query, key, value, out, lse, bias, causal, scale, band=None):
    query, key, value = aligned(query, key, value)
    if band is not None:
        return _banded_backward(grad, query, key, value, out, lse, scale, band)
    # Dense batches have no cumulative lengths, and the kernel reads its rng state as one tensor.
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    unused = torch.empty(0, dtype=torch.uint64, device=query.device)
    return aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, out, lse, None, None, query.shape[2], key.shape[2],
        0.0, causal, state, unused, scale=scale,
    )  # fmt: skip


def _banded_forward(query, key, value, scale, band):
    batch, _, n, _ = query.shape
    rows, keys, values = (_packed(tensor, band) for tensor in (query, key, value))
    out, lse, *_ = aten._flash_attention_forward(
        rows, keys, values, *_lengths(n, key.shape[2], band), 0.0, True, False,
        scale=scale, **_window(band),
    )  # fmt: skip
    if band.limits is not None:
        lse = lse.unflatten(1, (batch, n)).transpose(0, 1)
    return _unpacked(out, batch), lse


def _banded_backward(grad, query, key, value, out, lse, scale, band):
    batch, _, n, _ = query.shape
    if band.limits is not None:
        lse = lse.transpose(0, 1).flatten(1).contiguous()
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    unused = torch.empty(0, dtype=torch.uint64, device=query.device)
    rows, keys, values = (_packed(tensor, band) for tensor in (query, key, value))
    found = aten._flash_attention_backward(
        _packed(grad, band), rows, keys, values, _packed(out, band), lse,
        *_lengths(n, key.shape[2], band), 0.0, True, state, unused, scale=scale, **_window(band),
    )  # fmt: skip
    return tuple(_unpacked(gradient, batch) for gradient in found)


def _packed(tensor: Tensor, band: Band) -> Tensor:
    """(B, n, H, D), or (B n, H, D) where documents of all sequences lie in one row."""
    tensor = tensor.transpose(1, 2)
    return tensor if band.limits is None else tensor.flatten(0, 1)


def _unpacked(tensor: Tensor, batch: int) -> Tensor:
    tensor = tensor if tensor.dim() == 4 else tensor.unflatten(0, (batch, -1))
    return tensor.transpose(1, 2)


def _lengths(n: int, m: int, band: Band) -> tuple[Tensor | None, Tensor | None, int, int]:
    if band.limits is None:
        return None, None, n, m
    limits, longest = band.limits
    return limits, limits, longest, longest


def _window(band: Band) -> dict[str, int]:
    left = -1 if band.window is None else band.window - 1
    return {"window_size_left": left, "window_size_right": 0}


def _cudnn_forward(query, key, value, bias, causal, scale):
    query, key, value = aligned(query, key, value)
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
        query, key, value, bias, True, 0.0, causal, False, scale=scale
    )
    # Some versions give lse a trailing axis of one.
    lse = lse.squeeze(-1) if lse.dim() == 4 else lse
    # Out lies as the query does, of which an expanded one may have its heads or sequences last.
    out = out if out.stride(-1) == 1 else out.contiguous()
    return (out, lse) if bias is None else _with_blind_rows(out, lse, bias, causal)


def _cudnn_backward(grad, query, key, value, out, lse, bias, causal, scale):
    query, key, value = aligned(query, key, value)
    seed, offset = _no_random_state(query)
    # Up to PyTorch 2.13 a graph is found again whatever the strides of these two, and reads them by those of
    # the first call. So they lie as the query does in every call of ours; and the dropout, which is compared
    # by its bytes, keeps graphs apart that other calls have made for gradients in any layout.
    grad, out = (_as_it_lies(tensor, query) for tensor in (grad, out))
    no_dropout = -0.0
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad, query, key, value, out, lse.unsqueeze(-1), seed, offset, bias, None, None,
        query.shape[2], key.shape[2], no_dropout, causal, scale=scale,
    )  # fmt: skip


def _as_it_lies(tensor: Tensor, like: Tensor) -> Tensor:
    laid = torch.empty_like(like)
    return tensor if tensor.stride() == laid.stride() else laid.copy_(tensor)


# The memory-efficient kernel has no grouped heads: it steps from head to head by one stride, and no stride repeats
# each of several key heads, so with more than one they are copied, as Transformers does for stock attention. A
# single one has a stride of zero and no copy. It also pads lse to a multiple of 32 rows, wants the rows of a
# bias aligned to 16 bytes, and reads ``out`` in the backward as (batch, rows, heads, dim) whatever its strides.
_LSE_ROWS = 32
_BIAS_COLUMNS = 16


def _repeat_groups(query: Tensor, tensor: Tensor) -> Tensor:
    groups = query.shape[1] // tensor.shape[1]
    return tensor.unsqueeze(2).expand(-1, -1, groups, -1, -1).flatten(1, 2)


def _sum_groups(grad: Tensor, like: Tensor) -> Tensor:
    batch, heads, length, dim = like.shape
    return grad.reshape(batch, heads, -1, length, dim).sum(2)


def _aligned_bias(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor | None:
    if bias is None:
        return None
    length = key.shape[2]
    bias = bias.expand(*bias.shape[:-1], length)
    apart = all(stride % _BIAS_COLUMNS == 0 for stride in bias.stride()[:-1])
    if not (apart and bias.stride(-1) == 1 and _is_aligned(bias)):
        padding = -length % _BIAS_COLUMNS
        bias = torch.nn.functional.pad(bias, (0, padding))[..., :length]
    return bias.expand(query.shape[0], query.shape[1], query.shape[2], length)


def as_rows_of_key_heads(tensor: Tensor, kv_heads: int) -> Tensor:
    """What there is of each head and one row, (B, H or 1, 1, ...), with the heads of a key head as its rows."""
    return tensor if tensor.shape[1] == 1 else tensor.unflatten(1, (kv_heads, -1)).squeeze(3)


def mask_as_bias(attn_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as 0 and -inf, in one launch, its rows as far apart as kernels want them."""
    *rows, length = attn_mask.shape
    wide = torch.empty(
        *rows, length + -length % _BIAS_COLUMNS, dtype=dtype, device=attn_mask.device
    )
    return torch.log(attn_mask, out=wide[..., :length])


def efficient_row(query, key, value, bias, scale):
    """One row, the query heads of a key head as its rows, so that no key is copied for them.

    Returns ``out`` (B, K, G, D) and ``lse`` (B, K, G), G query heads to each of K key heads; of a row whose
    every bias is -inf they say this and that.
    """
    query, key, value = aligned(query, key, value)
    rows = as_rows_of_key_heads(query, key.shape[1])
    bias = None if bias is None else as_rows_of_key_heads(bias, key.shape[1])
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        rows, key, value, _aligned_bias(rows, key, bias), True, 0.0, False, scale=scale
    )
    return out, lse[..., : rows.shape[2]]


def _efficient_forward(query, key, value, bias, causal, scale):
    if query.shape[2] == 1:
        out, lse = efficient_row(query, key, value, bias, scale)
        out, lse = out.reshape(query.shape), lse.reshape(query.shape[:3])
        return (out, lse) if bias is None else _with_blind_rows(out, lse, bias, causal)
    query, key, value = aligned(query, key, value)
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        query, _repeat_groups(query, key), _repeat_groups(query, value),
        _aligned_bias(query, key, bias), True, 0.0, causal, scale=scale,
    )  # fmt: skip
    lse = lse[..., : query.shape[2]]
    return (out, lse) if bias is None else _with_blind_rows(out, lse, bias, causal)


def _efficient_backward(grad, query, key, value, out, lse, bias, causal, scale):
    query, key, value = aligned(query, key, value)
    seed, offset = _no_random_state(query)
    padding = -query.shape[2] % _LSE_ROWS
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    # An infinite lse gives the padded rows a probability of zero.
    lse = torch.nn.functional.pad(lse, (0, padding), value=torch.inf)
    d_query, d_key, d_value, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad, query, _repeat_groups(query, key), _repeat_groups(query, value),
        _aligned_bias(query, key, bias), out, lse, seed, offset, 0.0,
        [True, True, True, False], causal, scale=scale,
    )  # fmt: skip
    return d_query, _sum_groups(d_key, key), _sum_groups(d_value, value)


KERNELS: dict[str, Kernel] = {
    "cpu": Kernel(_cpu_forward, _cpu_backward),
    "cuda": Kernel(_cuda_forward, _cuda_backward),
    "cudnn": Kernel(_cudnn_forward, _cudnn_backward),
    "efficient": Kernel(_efficient_forward, _efficient_backward),
}
