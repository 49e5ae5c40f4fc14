"""PyTorch's fused CUDA attention operators on CPU tensors, with the contract of the real ones.

PyTorch has no CPU kernels under these names; :func:`register` puts some there. Each does what the CUDA code
does with its arguments: the checks, the layout and padding of what it returns, and the memory it reads,
through the strides it really uses and not those that the tensor has. What a kernel leaves unwritten is NaN.
So a call that passes here may still be slow on a card, but one that fails here fails there, or is wrong there
in silence.

Written after attention.cu, attention_backward.cu, flash_api.cpp, kernel_forward.h, kernel_backward.h and
cudnn/MHA.cpp of PyTorch 2.9 to 2.13. Nothing of it has been held against a card yet.

Letters: B batch, H query heads, K key heads, n query rows, m keys, D head_dim.
"""

import itertools
import math
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

HALF = (torch.float16, torch.bfloat16)


@dataclass
class Card:
    """The GPU that is emulated.

    Attributes:
        capability: as ``torch.cuda.get_device_capability`` tells it.
        cudnn_key_has_out: whether the cache of cuDNN's backward graphs minds the strides of ``out`` and
            ``grad``; up to PyTorch 2.13 it does not.
        calls: the operators that ran, with the shapes of query and key.
        graphs: that cache.
    """

    capability: tuple[int, int] = (9, 0)
    cudnn_key_has_out: bool = False
    calls: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    graphs: dict[tuple, tuple] = field(default_factory=dict)

    def reset(self, capability: tuple[int, int]) -> None:
        self.capability = capability
        self.calls.clear()
        self.graphs.clear()


CARD = Card()
# Bytes that a block of a kernel can have, by capability.
SHARED_MEMORY = {(9, 0): 232448, (8, 0): 166912, (7, 5): 65536}


class ContractError(RuntimeError):
    """What a card would refuse, or crash of."""


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ContractError(message)


def called(name: str, query: Tensor, key: Tensor) -> None:
    CARD.calls.append((name, tuple(query.shape), tuple(key.shape)))


# --- Arithmetic, as tensor cores do it: products of halves summed in float32, weights rounded in between.


@dataclass(frozen=True)
class Scores:
    """What decides the scores: everything but query and key.

    Attributes:
        hidden: which scores are not seen, (n, m), or None.
        bias: (B, H, n, m), or None.
    """

    scale: float
    hidden: Tensor | None = None
    bias: Tensor | None = None

    def of(self, query: Tensor, key: Tensor) -> Tensor:
        """(B, H, n, m) in float32, of query (B, n, H, D) and key (B, m, H, D)."""
        scores = torch.einsum("bihd,bjhd->bhij", query.float(), key.float()) * self.scale
        if self.bias is not None:
            scores = scores + self.bias.float()
        return scores if self.hidden is None else scores.masked_fill(self.hidden, -torch.inf)


def causal_square(n: int, m: int, causal: bool) -> Tensor | None:
    """Aligned top-left, as the memory-efficient kernel and cuDNN have it."""
    return torch.ones(n, m, dtype=torch.bool).triu(1) if causal else None


def banded(n: int, m: int, left: int, right: int) -> Tensor | None:
    """Aligned bottom-right, as FlashAttention has it; a negative side is open."""
    distance = (m - n) + torch.arange(n).unsqueeze(-1) - torch.arange(m)
    hidden = torch.zeros(n, m, dtype=torch.bool)
    if left >= 0:
        hidden |= distance > left
    if right >= 0:
        hidden |= -distance > right
    return hidden


def forward_math(query: Tensor, key: Tensor, value: Tensor, scores: Scores, out: Tensor) -> Tensor:
    """Fill ``out`` (B, n, H, D); the logsumexp (B, H, n), -inf for a row that sees nothing."""
    found = scores.of(query, key)
    top = found.amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = torch.exp(found - top)
    total = weights.sum(-1)
    product = torch.einsum("bhij,bjhd->bihd", weights.to(query.dtype).float(), value.float())
    out.copy_((product / total.transpose(1, 2).unsqueeze(-1)).nan_to_num(nan=0.0))
    return top.squeeze(-1) + torch.log(total)


def backward_math(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scores: Scores,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients in float32, from whatever ``out`` and ``lse`` are given."""
    delta = (grad.float() * out.float()).sum(-1).transpose(1, 2)
    found = scores.of(query, key)
    weights = torch.where(found == -torch.inf, 0.0, torch.exp(found - lse.unsqueeze(-1)))
    d_weights = torch.einsum("bihd,bjhd->bhij", grad.float(), value.float())
    d_scores = (weights * (d_weights - delta.unsqueeze(-1))).to(query.dtype).float()
    d_value = torch.einsum("bhij,bihd->bjhd", weights.to(query.dtype).float(), grad.float())
    d_query = torch.einsum("bhij,bjhd->bihd", d_scores, key.float()) * scores.scale
    d_key = torch.einsum("bhij,bihd->bjhd", d_scores, query.float()) * scores.scale
    return d_query, d_key, d_value


def repeat(tensor: Tensor, heads: int) -> Tensor:
    return tensor.repeat_interleave(heads // tensor.shape[2], dim=2)


def sum_groups(grad: Tensor, kv_heads: int) -> Tensor:
    return grad.unflatten(2, (kv_heads, -1)).sum(3)


def scale_of(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


def raw(tensor: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """What a kernel reads that has its own idea of the strides."""
    try:
        return tensor.as_strided(shape, strides)
    except RuntimeError as error:
        raise ContractError(f"an illegal memory access: {error}") from error


# --- FlashAttention 2, as PyTorch has it.


def _check_flash(query: Tensor, key: Tensor, value: Tensor) -> None:
    check(CARD.capability >= (8, 0), "FlashAttention only supports Ampere GPUs or newer.")
    check(query.dtype in HALF, "FlashAttention only support fp16 and bf16 data type")
    check(key.dtype == value.dtype == query.dtype, "query, key and value must have the same dtype")
    for tensor in (query, key, value):
        check(tensor.stride(-1) == 1, "Input tensor must have contiguous last dimension")
    heads, dim = query.shape[-2:]
    check(dim % 8 == 0, "head_size must be a multiple of 8, this is ensured by padding!")
    check(dim <= 256, "FlashAttention forward only supports head dimension at most 256")
    check(
        heads % key.shape[-2] == 0,
        "Number of heads in key/value must divide number of heads in query",
    )
    check(value.shape == key.shape, "v must have the shape of k")
    check(key.shape[-1] == dim, "k must have shape (batch_size, seqlen_k, num_heads_k, head_size)")
    for tensor in (query, key, value):  # not checked there, but read 16 bytes at a time
        check(tensor.data_ptr() % 16 == 0, "misaligned address (data pointer)")
        rows = zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True)
        check(all(s % 8 == 0 for s, size in rows if size > 1), "misaligned address (stride)")


def _window(left: int | None, right: int | None, n: int, m: int, causal: bool) -> tuple[int, int]:
    left, right = (-1 if side is None else (side + 2**31) % 2**32 - 2**31 for side in (left, right))
    left, right = (-1 if side >= m else side for side in (left, right))  # ints of 32 bits there
    if causal and n > 1:
        right = 0
    return left, right


def _dense_flash(query, key, value, causal, scale, left, right):
    """Out (B, n, H, D) and lse (B, H, n), of query (B, n, H, D)."""
    _check_flash(query, key, value)
    batch, n, heads, dim = query.shape
    m, kv_heads = key.shape[1:3]
    check(batch > 0, "batch size must be positive")
    check(key.shape[0] == batch, "k must have shape (batch_size, seqlen_k, num_heads_k, head_size)")
    left, right = _window(left, right, n, m, causal)
    scale = scale_of(query, scale)
    if n == 1 and heads > kv_heads and left < 0 and right < 0:  # seqlenq_ngroups_swapped
        rows = query.reshape(batch, kv_heads, heads // kv_heads, dim).transpose(1, 2)
        out = torch.empty_like(rows).fill_(math.nan)
        lse = forward_math(rows, key, value, Scores(scale), out)
        return out.transpose(1, 2).reshape(batch, 1, heads, dim), lse.reshape(batch, heads, 1)
    out = torch.empty_like(query).fill_(math.nan)
    scores = Scores(scale, banded(n, m, left, right))
    lse = forward_math(query, repeat(key, heads), repeat(value, heads), scores, out)
    return out, lse.contiguous().masked_fill(lse == -torch.inf, torch.inf)


def _dense_flash_backward(grad, query, key, value, out, lse, causal, scale, left, right):
    grad, out = grad.contiguous(), out.contiguous()
    _check_flash(query, key, value)
    batch, n, heads, _ = query.shape
    m, kv_heads = key.shape[1:3]
    check(out.dtype == grad.dtype == query.dtype, "out and dout must have the dtype of query")
    check(out.shape == grad.shape == query.shape, "out and dout must have the shape of query")
    check(lse.dtype == torch.float32, "lse is read as float32")
    lse = raw(lse, (batch, heads, n), (heads * n, n, 1))
    left, right = _window(left, right, n, m, causal)
    scores = Scores(scale_of(query, scale), banded(n, m, left, right))
    wide = (repeat(key, heads), repeat(value, heads))
    d_query, d_key, d_value = backward_math(grad, query, *wide, out, lse, scores)
    found = (
        (d_query, query),
        (sum_groups(d_key, kv_heads), key),
        (sum_groups(d_value, kv_heads), value),
    )
    return tuple(torch.empty_like(like).copy_(gradient) for gradient, like in found)


def _flash_states(query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64), query.new_empty(0),
    )  # fmt: skip


def flash_forward(
    query, key, value, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None
):
    called("flash forward", query, key)
    check(dropout_p == 0, "emulated without dropout")
    swapped = (tensor.transpose(1, 2) for tensor in (query, key, value))
    out, lse = _dense_flash(*swapped, is_causal, scale, None, None)
    state, unused, mask = _flash_states(query)
    return out.transpose(1, 2), lse, None, None, query.shape[2], key.shape[2], state, unused, mask


def flash_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p,
    is_causal, philox_seed, philox_offset, *, scale=None,
):  # fmt: skip
    called("flash backward", query, key)
    check(dropout_p == 0 and cum_seq_q is None and cum_seq_k is None, "dense, without dropout")
    swapped = (tensor.transpose(1, 2) for tensor in (grad_out, query, key, value, out))
    gradients = _dense_flash_backward(*swapped, logsumexp, is_causal, scale, None, None)
    return tuple(gradient.transpose(1, 2) for gradient in gradients)


def _documents(
    query: Tensor, key: Tensor, cum_seq_q: Tensor, cum_seq_k: Tensor
) -> list[tuple[slice, slice]]:
    for name, limits in (("cu_seqlens_q", cum_seq_q), ("cu_seqlens_k", cum_seq_k)):
        check(limits.dtype == torch.int32, f"{name} must have dtype int32")
        check(limits.is_contiguous(), f"{name} must be contiguous")
    check(cum_seq_q.numel() == cum_seq_k.numel(), "cu_seqlens_k must have shape (batch_size + 1)")
    check(query.dim() == key.dim() == 3, "packed tensors are (total, heads, head_size)")
    rows, keys = cum_seq_q.tolist(), cum_seq_k.tolist()
    check(
        rows[-1] <= query.shape[0] and keys[-1] <= key.shape[0],
        "an illegal memory access: cu_seqlens",
    )
    pairs = zip(itertools.pairwise(rows), itertools.pairwise(keys), strict=True)
    return [(slice(*row), slice(*key)) for row, key in pairs]


def flash_attention_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *,
    scale=None, window_size_left=None, window_size_right=None, seqused_k=None, alibi_slopes=None,
    block_table=None, num_splits=None,
):  # fmt: skip
    """Dense (B, n, H, D) with lse (B, H, n), or packed (total, H, D) with lse (H, total)."""
    called("flash window forward" if cum_seq_q is None else "flash packed forward", query, key)
    check(dropout_p == 0 and not return_debug_mask, "emulated without dropout")
    unused = (seqused_k, alibi_slopes, block_table, num_splits)
    check(all(argument is None for argument in unused), "emulated without these arguments")
    window = (window_size_left, window_size_right)
    if cum_seq_q is None:
        out, lse = _dense_flash(query, key, value, is_causal, scale, *window)
        return out, lse, *_flash_states(query)
    _check_flash(query, key, value)
    out = torch.empty_like(query).fill_(math.nan)
    lse = torch.full((query.shape[1], query.shape[0]), math.nan)
    for rows, keys in _documents(query, key, cum_seq_q, cum_seq_k):
        check(rows.stop - rows.start <= max_q and keys.stop - keys.start <= max_k, "max_q, max_k")
        if rows.start == rows.stop:
            continue
        # The kernel masks by the longest document's lengths; alignment is each document's own.
        scores = Scores(
            scale_of(query, scale),
            banded(
                rows.stop - rows.start, keys.stop - keys.start,
                *_window(*window, max_q, max_k, is_causal),
            ),
        )  # fmt: skip
        parts = (query[None, rows], *(repeat(t[None, keys], query.shape[1]) for t in (key, value)))
        found = forward_math(*parts, scores, out[None, rows])[0]
        lse[:, rows] = found.masked_fill(found == -torch.inf, torch.inf)
    return out, lse, *_flash_states(query)


def flash_attention_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p,
    is_causal, rng_state, unused, *, scale=None, window_size_left=None, window_size_right=None,
):  # fmt: skip
    called("flash window backward" if cum_seq_q is None else "flash packed backward", query, key)
    check(dropout_p == 0, "emulated without dropout")
    window = (window_size_left, window_size_right)
    if cum_seq_q is None:
        return _dense_flash_backward(
            grad_out, query, key, value, out, logsumexp, is_causal, scale, *window
        )
    grad, out = grad_out.contiguous(), out.contiguous()
    _check_flash(query, key, value)
    check(logsumexp.dtype == torch.float32, "lse is read as float32")
    total, heads, _ = query.shape
    kv_heads = key.shape[1]
    lse = raw(logsumexp, (heads, total), (total, 1))
    gradients = tuple(torch.empty_like(tensor).fill_(math.nan) for tensor in (query, key, value))
    for rows, keys in _documents(query, key, cum_seq_q, cum_seq_k):
        scores = Scores(
            scale_of(query, scale),
            banded(
                rows.stop - rows.start, keys.stop - keys.start,
                *_window(*window, max_q, max_k, is_causal),
            ),
        )  # fmt: skip
        wide = (repeat(tensor[None, keys], heads) for tensor in (key, value))
        of_query, of_key, of_value = backward_math(
            grad[None, rows], query[None, rows], *wide, out[None, rows], lse[None, :, rows], scores
        )
        gradients[0][rows] = of_query[0].to(query.dtype)
        gradients[1][keys] = sum_groups(of_key, kv_heads)[0].to(key.dtype)
        gradients[2][keys] = sum_groups(of_value, kv_heads)[0].to(value.dtype)
    return gradients


# --- The memory-efficient kernels (CUTLASS).

_LSE_ROWS = 32


def _padded(n: int) -> int:
    return -(-n // _LSE_ROWS) * _LSE_ROWS


def _check_efficient(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> Tensor | None:
    """The checks; the bias as (B, H, n, m). Tensors are (B, n, H, D) here."""
    check(query.dtype in (*HALF, torch.float32), "cutlassF: no kernel found to launch! (dtype)")
    no_bfloat16 = CARD.capability < (8, 0) and query.dtype == torch.bfloat16
    check(not no_bfloat16, "cutlassF: no kernel found to launch! (bfloat16 below sm80)")
    check(query.shape[0] == key.shape[0] == value.shape[0], "batch sizes")
    check(key.shape[1] == value.shape[1], "key.size(1) == value.size(1)")
    check(query.shape[2] == key.shape[2] == value.shape[2], "query.size(2) == key.size(2)")
    check(query.shape[3] == key.shape[3], "query.size(3) == key.size(3)")
    alignment = 8 if query.dtype in HALF else 4
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        check(tensor.dtype == query.dtype, f"{name}: dtype")
        check(tensor.stride(-1) == 1, f"{name} must have contiguous last dimension")
        check(tensor.stride(2) % alignment == 0, f"no kernel found to launch! ({name}.stride(2))")
        check(tensor.stride(1) % alignment == 0, f"{name} is not correctly aligned (strideM)")
        one_batch = tensor.shape[0] <= 1
        check(
            one_batch or tensor.stride(0) % alignment == 0,
            f"{name} is not correctly aligned (strideB)",
        )
        aligned = tensor.data_ptr() % (alignment * tensor.element_size()) == 0
        check(aligned, f"{name} is not correctly aligned (pointer)")
        check(tensor.shape[3] % alignment == 0, f"{name} is not correctly aligned (head_dim)")
    if bias is None:
        return None
    batch, n, heads, _ = query.shape
    check(bias.dtype == query.dtype, "invalid dtype for bias - should match query's dtype")
    check(bias.dim() == 4, "Bias expected in BMHK format")
    check(bias.stride(-1) == 1, "attn_bias must have contiguous last dimension")
    view = bias.expand(batch, heads, n, key.shape[1])
    for stride, size, name in zip(view.stride()[:3], view.shape[:3], "BHM", strict=True):
        check(
            size <= 1 or stride % alignment == 0,
            f"attn_bias is not correctly aligned (stride{name})",
        )
    aligned = bias.data_ptr() % (alignment * bias.element_size()) == 0
    check(aligned, "attn_bias is not correctly aligned (pointer)")
    return view


def efficient_forward(
    query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None
):
    called("efficient forward", query, key)
    check(dropout_p == 0, "emulated without dropout")
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    bias = _check_efficient(query, key, value, attn_bias)
    batch, n, heads, _ = query.shape
    out = query.new_full((batch, n, heads, value.shape[3]), math.nan)
    scores = Scores(scale_of(query, scale), causal_square(n, key.shape[1], is_causal), bias)
    found = forward_math(query, key, value, scores, out)
    lse = torch.full((batch, heads, _padded(n) if compute_log_sumexp else 0), math.nan)
    if compute_log_sumexp:
        lse[..., :n] = found
    seed, offset = (torch.empty((), dtype=torch.int64) for _ in range(2))
    return out.transpose(1, 2), lse, seed, offset


def efficient_backward(
    grad_out_, query, key, value, attn_bias, out, logsumexp, philox_seed, philox_offset, dropout_p,
    grad_input_mask, is_causal=False, *, scale=None,
):  # fmt: skip
    called("efficient backward", query, key)
    grad, query, key, value, out = (
        tensor.transpose(1, 2) for tensor in (grad_out_, query, key, value, out)
    )
    bias = _check_efficient(query, key, value, attn_bias)
    grad = grad.contiguous()
    batch, n, heads, _ = query.shape
    width = value.shape[3]
    check(grad.shape == (batch, n, heads, width), "grad_out: sizes")
    if attn_bias is not None:
        check(attn_bias.shape == (batch, heads, n, key.shape[1]), "attn_bias: wrong shape")
    check(logsumexp.dtype == torch.float32, "lse is read as float32")
    check(logsumexp.shape[2] >= _padded(n), "lse is read in blocks of 32 rows")
    check(heads <= 1 or logsumexp.stride(1) % 8 == 0, "LSE is not correctly aligned (strideH)")
    lse = raw(logsumexp, (batch, heads, n), (logsumexp.stride(0), logsumexp.stride(1), 1))
    if (
        query.dtype in HALF
    ):  # the kernel works out rowsum(grad * out), and knows no row stride of out
        strides = (out.stride(0), width * heads, out.stride(2), 1)
        out = raw(out, (batch, n, heads, width), strides)
    scores = Scores(scale_of(query, scale), causal_square(n, key.shape[1], is_causal), bias)
    found = backward_math(grad, query, key, value, out, lse, scores)
    gradients = (
        query.new_empty(tensor.shape).copy_(gradient).transpose(1, 2)
        for gradient, tensor in zip(found, (query, key, value), strict=True)
    )
    return *gradients, None


# --- cuDNN.


def _matching_layout(like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Dense, the axes in the order in which those of ``like`` lie in memory."""
    order = sorted(range(4), key=lambda axis: (like.stride(axis), -axis), reverse=True)
    dense = torch.empty([shape[axis] for axis in order], dtype=like.dtype)
    return dense.permute([order.index(axis) for axis in range(4)])


def _check_cudnn(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor | None:
    """The checks; the bias as (B, H, n, m)."""
    check(CARD.capability >= (8, 0), "cuDNN MHA only supports sm80 and newer")
    check(query.dtype in HALF, "cuDNN MHA takes float16 and bfloat16")
    check(key.dtype == value.dtype == query.dtype, "query, key and value must have the same dtype")
    check(key.shape[2] != 1, "cudnn SDPA does not support key/value sequence length 1.")
    limit = 256 if CARD.capability == (9, 0) else 128
    check(max(query.shape[3], value.shape[3]) <= limit, f"head_dim should be no more than {limit}")
    check(query.shape[3] % 8 == 0 and value.shape[3] % 8 == 0, "head_dim should be a multiple of 8")
    for tensor in (query, key, value):
        check(tensor.stride(-1) == 1, "last dimension should be contiguous")
        check(tensor.data_ptr() % 16 == 0, "pointers must be aligned to 16 bytes")
    if bias is None:
        return None
    check(bias.dim() == 4 and bias.dtype == query.dtype, "attn_bias: four axes, in query's dtype")
    return bias.expand(*query.shape[:3], key.shape[2])


def cudnn_forward(
    query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False,
    return_debug_mask=False, *, scale=None,
):  # fmt: skip
    called("cudnn forward", query, key)
    check(dropout_p == 0, "emulated without dropout")
    bias = _check_cudnn(query, key, value, attn_bias)
    batch, heads, n, _ = query.shape
    m = key.shape[2]
    out = _matching_layout(query, (batch, heads, n, value.shape[3])).fill_(math.nan)
    rows, *pair = (tensor.transpose(1, 2) for tensor in (query, key, value))
    scores = Scores(scale_of(query, scale), causal_square(n, m, is_causal), bias)
    lse = forward_math(rows, *(repeat(t, heads) for t in pair), scores, out.transpose(1, 2))
    seed, offset = (torch.empty((), dtype=torch.int64) for _ in range(2))
    return out, lse.contiguous().unsqueeze(-1), None, None, n, m, seed, offset, None


def cudnn_backward(
    grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q,
    cum_seq_k, max_q, max_k, dropout_p, is_causal, *, scale=None,
):  # fmt: skip
    called("cudnn backward", query, key)
    check(dropout_p == 0, "emulated without dropout")
    bias = _check_cudnn(query, key, value, attn_bias)
    heads, n = query.shape[1:3]
    m, kv_heads = key.shape[2], key.shape[1]
    check((max_q, max_k) == (n, m), "max_q, max_k")
    stats = logsumexp.dim() == 4 and logsumexp.shape[3] == 1 and logsumexp.dtype == torch.float32
    check(stats, "stats are (B, H, n, 1) float32")
    if grad_out.stride(-1) != 1:
        grad_out = _matching_layout(out, grad_out.shape).copy_(grad_out)
    # A graph is made for the first call of its key, and reads what comes later by the strides of that one.
    key_of = (
        query.dtype, *((tuple(t.shape), t.stride()) for t in (query, key, value)),
        None if bias is None else (tuple(bias.shape), bias.stride()), is_causal,
        struct.pack("d", dropout_p),  # keys are compared by their bytes
    )  # fmt: skip
    strides = (out.stride(), grad_out.stride(), logsumexp.stride())
    if CARD.cudnn_key_has_out:
        key_of += strides
    made_for = CARD.graphs.setdefault(key_of, strides)
    out, grad, lse = (
        raw(tensor, tensor.shape, of_first)
        for tensor, of_first in zip((out, grad_out, logsumexp), made_for, strict=True)
    )
    swapped = [tensor.transpose(1, 2) for tensor in (grad, query, key, value, out)]
    swapped[2:4] = (repeat(tensor, heads) for tensor in swapped[2:4])
    scores = Scores(scale_of(query, scale), causal_square(n, m, is_causal), bias)
    d_query, d_key, d_value = backward_math(*swapped, lse.squeeze(-1), scores)
    found = (
        (d_query, query),
        (sum_groups(d_key, kv_heads), key),
        (sum_groups(d_value, kv_heads), value),
    )
    return tuple(torch.empty_like(like).copy_(gradient.transpose(1, 2)) for gradient, like in found)


OPERATORS: dict[str, Callable] = {
    "_scaled_dot_product_flash_attention": flash_forward,
    "_scaled_dot_product_flash_attention_backward": flash_backward,
    "_flash_attention_forward": flash_attention_forward,
    "_flash_attention_backward": flash_attention_backward,
    "_scaled_dot_product_efficient_attention": efficient_forward,
    "_scaled_dot_product_efficient_attention_backward": efficient_backward,
    "_scaled_dot_product_cudnn_attention": cudnn_forward,
    "_scaled_dot_product_cudnn_attention_backward": cudnn_backward,
}
_library: torch.library.Library | None = None
_ours: torch.library.Library | None = None


def take_share(out, lse, sink, number, top, result):
    """As the kernel of ``triton_kernels.py``, which cannot run here: one launch."""
    check(out.stride(-1) == result.stride(-1) == 1 and lse.dtype == torch.float32, "rows")
    sink = torch.tensor(number) if sink is None else sink.float()
    check(lse.shape == out.shape[:3] == result.shape[:3], "shapes")
    product = out.float() * torch.sigmoid(lse - sink).unsqueeze(-1)
    total = torch.logaddexp(lse, sink)
    if top is not None:
        blind = top == -torch.inf
        product, total = product.masked_fill(blind.unsqueeze(-1), 0.0), total.where(~blind, sink)
    result.copy_(product)
    lse.copy_(total)


def look_up(table, positions):
    rows = positions.long().clamp(0, len(table) - 1)
    return table[rows].squeeze(-1).transpose(1, 2).contiguous()


class TritonKernels:
    """In place of that module: an operator each, so that what counts launches sees one."""

    look_up = staticmethod(lambda *tensors: torch.ops.stablemask_contract.look_up(*tensors))

    @staticmethod
    def take_share(out, lse, sink, top, result):
        number = None if isinstance(sink, Tensor) else float(sink)
        sink = sink if isinstance(sink, Tensor) else None
        torch.ops.stablemask_contract.take_share(out, lse, sink, number, top, result)


READ_BY_THE_HOST = {"cpu", "item", "numpy", "tolist", "__bool__", "__int__", "__float__"}


class Reads(TorchFunctionMode):
    """Counts how often the host waits for numbers of a device."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in READ_BY_THE_HOST
        return function(*args, **(kwargs or {}))


def read_later(numbers: Tensor) -> Callable[[], list]:
    """They are there once the card has computed another attention; whoever asks before waits."""
    asked = len(CARD.calls)

    def read() -> list:
        if len(CARD.calls) == asked:
            return numbers.tolist()
        with torch._C.DisableTorchFunction():
            return numbers.tolist()

    return read


def register() -> None:
    """Put them where PyTorch has nothing: the CPU's entry of its table, for the rest of the process."""
    global _library, _ours
    if _library is None:
        _ours = torch.library.Library("stablemask_contract", "DEF")
        _ours.define(
            "take_share(Tensor(a!) out, Tensor(b!) lse, Tensor? sink, float? number, Tensor? top, "
            "Tensor(c!) result) -> ()"
        )
        _ours.define("look_up(Tensor table, Tensor positions) -> Tensor")
        _ours.impl("take_share", take_share, "CPU")
        _ours.impl("look_up", look_up, "CPU")
        _library = torch.library.Library("aten", "IMPL")
        for name, function in OPERATORS.items():
            # A kernel's own arithmetic is no concern of autocast's.
            _library.impl(name, torch.autocast("cpu", enabled=False)(function), "CPU")


def emulate(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> Card:
    """Let the package take CPU tensors for those of such a GPU, and call the operators above with them.

    What a card alone can show is not: CUDA graphs, memory, time, Triton's kernels, NCCL.
    """
    from torch.nn.attention import flex_attention

    from stablemask.backends import choice, flex, hardware, native

    register()
    CARD.reset(capability)
    monkeypatch.setattr(hardware, "kind_of", lambda tensor: "cuda")
    monkeypatch.setattr(hardware, "capability", lambda device: capability)
    monkeypatch.setattr(hardware, "cudnn_version", lambda: 91600)
    monkeypatch.setattr(hardware, "shared_memory", lambda device: SHARED_MEMORY[capability])
    monkeypatch.setattr(hardware, "compiler_problem", lambda: "nothing is compiled here")
    monkeypatch.setattr(native, "LIBRARY", None)
    monkeypatch.setattr(hardware, "is_capturing", lambda tensor: False)
    monkeypatch.setattr(hardware, "read_later", read_later)
    monkeypatch.setattr(hardware, "triton_kernels", lambda: TritonKernels)
    # FlexAttention unfused has the lse and a backward, as its compiled kernel has.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "_compiled", lambda structure: flex._flex)
    monkeypatch.setattr(choice, "_stock_prefers_cudnn", choice._stock_prefers_cudnn.__wrapped__)
    return CARD


@contextmanager
def emulated(capability: tuple[int, int]) -> Iterator[Card]:
    """:func:`emulate` for a part of a test, or on a rank of its own."""
    with pytest.MonkeyPatch.context() as patch:
        yield emulate(patch, capability)
