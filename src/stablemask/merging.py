"""Attention to a range of keys at a time: the parts, and how they become one.

Softmax over a union of key ranges is a mean of the softmaxes over each, weighted by the mass that each
saw. A part therefore hands on its output and the logsumexp of its scores, and a sink is a part without
an output. Chunks of a cache, and shards of a sequence on several devices
(``distributed/context_parallel.py``), are joined so.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import FLOATS, autocast, check_masks, check_scale, check_sink, check_tensors
from .backends.stock.flash import attend_with_lse, stock_kernel
from .call import Call, as_tensor


def partial_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    past: int,
    attn_mask: Tensor | None = None,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention to one range of keys, without a sink, through the stock flash kernel.

    Differentiable in query, key and value through both results.

    Args:
        query: ``(batch, heads, q_len, head_dim)``, floating point.
        key, value: ``(batch, kv_heads, kv_len, ...)``, the range.
        past: number of keys from the first of the range to the first query row, so that row ``i``
            sees the keys up to ``past + i``. From 0 to ``kv_len - q_len`` where the rows stand in the
            range; ``kv_len`` or more where they all come after it and see all of it.
        attn_mask, window, alibi_slopes, scale: as in :func:`~stablemask.sink_attention`, for this range.

    Returns:
        ``out (batch, heads, q_len, value_dim)`` in the dtype of ``query`` and ``lse (batch, heads,
        q_len)``, the logsumexp of the visible scores in float32 (float64 for float64 inputs); -inf,
        with an output of 0, for a row that sees nothing here.

    Raises:
        ValueError, TypeError: an argument does not fit, or no stock kernel serves the device or dtype.
    """
    check_tensors(query, key, value, past)
    masks = check_masks(query, key, attn_mask, window, alibi_slopes, None)
    query, key, value = autocast(query, key, value)
    scale = check_scale(scale, query)
    kernel = stock_kernel(Call(query, key, value, query.new_zeros(1, 1, 1), masks, 0.0, scale))
    return attend_with_lse(query, key, value, None, masks, past, scale, kernel)


def merge_attention(
    parts: Sequence[tuple[Tensor, Tensor]], sink_logits: Tensor | float | None = None
) -> tuple[Tensor, Tensor]:
    """Join attention to disjoint ranges of keys, and add the sink's mass once.

        lse = logsumexp(lse_1, ..., lse_P, sink_logits)        out = sum_p exp(lse_p - lse) out_p

    Differentiable in every part and in the sink.

    Args:
        parts: ``(out, lse)`` of each range, as :func:`partial_attention` returns them (FlexAttention and
            the flash-attn package do too): ``(batch, heads, q_len, value_dim)`` and ``(batch, heads,
            q_len)`` with the natural logarithm.
        sink_logits: as in :func:`~stablemask.sink_attention`; None for no sink. Parts that are
            merged again later get theirs in the last merge.

    Returns:
        ``out`` in the dtype of the parts, and ``lse``: a part again. An infinite sink takes all and gives an
        infinite lse.

    Raises:
        ValueError, TypeError: there is no part, shapes differ, or a sink does not fit.
    """
    parts = list(parts)
    if not parts:
        raise ValueError("parts must hold at least one (out, lse), got none")
    for part in parts:
        if not (isinstance(part, (tuple, list)) and len(part) == 2):
            raise TypeError(f"parts must be pairs (out, lse), got {type(part).__name__}")
        for each in part:
            kind = each.dtype if isinstance(each, Tensor) else type(each).__name__
            if kind not in FLOATS:
                raise TypeError(f"parts must be pairs of floating-point tensors, got {kind}")
    first = parts[0][0]
    for out, lse in parts:
        if out.shape != first.shape or lse.shape != first.shape[:3]:
            raise ValueError(
                f"each part must be (out, lse) of shapes {tuple(first.shape)} and "
                f"{tuple(first.shape[:3])}, got {tuple(out.shape)} and {tuple(lse.shape)}"
            )
    masses = [lse for _, lse in parts]
    if sink_logits is not None:
        sink = as_tensor(check_sink(sink_logits, first), first).to(masses[0].dtype)
        masses.append(sink.expand_as(masses[0]))
    stacked = torch.stack(masses)  # (parts and sink, batch, heads, q_len)
    # A row that has seen nothing at all, and one that a sink takes whole: an out of 0, and a gradient of 0
    # rather than NaN.
    largest = stacked.detach().amax(0)
    settled = largest.isinf()
    total = stacked.masked_fill(settled, 0.0).logsumexp(0)
    lse = torch.where(settled, largest, total)
    weights = [
        torch.exp(part_lse.masked_fill(settled, -torch.inf) - total).unsqueeze(-1)
        for _, part_lse in parts
    ]
    out = torch.stack([part * weight for (part, _), weight in zip(parts, weights)]).sum(0)
    return out.to(first.dtype), lse
