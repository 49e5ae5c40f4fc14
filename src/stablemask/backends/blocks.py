"""The definition in blocks of query rows: linear memory on every device, for every mask.

Serves what no flash kernel does: dropout, gradients of ``attn_mask`` and ``alibi_slopes``, devices
without a kernel. A block sees the keys that its rows can, and the backward computes it again, with
the same random numbers, rather than keep its scores.
"""

import functools
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..call import Call
from ..masks import Masks
from . import reference
from .calls import needs_gradient, under_torch_func

ROWS_IN_BLOCK = 256


def unsupported(call: Call) -> str | None:
    return None


def attend(call: Call) -> Tensor:
    """As ``reference.attend``, of which it is made."""
    n = call.query.shape[2]
    if n <= ROWS_IN_BLOCK:
        return reference.attend(call)  # one block: its scores are no more than the backward makes
    # `torch.func` and forward mode know no recomputation; there the scores of all blocks are kept.
    transformed = under_torch_func() or torch.autograd.forward_ad._current_level >= 0
    if transformed or not needs_gradient(call):
        return torch.cat([_attend_rows(call, rows) for rows in _blocks(n)], dim=2)

    call = _precise(call)
    parts = [
        checkpoint(
            functools.partial(_attend_rows, call, rows),
            use_reentrant=False,
            preserve_rng_state=call.dropout_p > 0,
        )
        for rows in _blocks(n)
    ]
    return torch.cat(parts, dim=2)


def _precise(call: Call) -> Call:
    """What several blocks read, of half precision, in float32, in which its gradient is then summed."""

    def widened(tensor):
        half = isinstance(tensor, Tensor) and tensor.dtype in (torch.float16, torch.bfloat16)
        return tensor.float() if half else tensor

    masks = replace(call.masks, alibi_slopes=widened(call.masks.alibi_slopes))
    if masks.attn_mask is not None and masks.attn_mask.shape[2] == 1:
        masks = replace(masks, attn_mask=widened(masks.attn_mask))
    return call._replace(
        key=widened(call.key),
        value=widened(call.value),
        sink_logits=widened(call.sink_logits),
        masks=masks,
    )


def _blocks(n: int) -> list[slice]:
    return [slice(start, min(start + ROWS_IN_BLOCK, n)) for start in range(0, n, ROWS_IN_BLOCK)]


def _attend_rows(call: Call, rows: slice) -> Tensor:
    query, key, value, sink_logits, masks, dropout_p, scale, _ = call
    past = key.shape[2] - query.shape[2]
    keys = slice(masks.first_key(past + rows.start), past + rows.stop)
    mask = masks.attn_mask
    if mask is not None:
        mask = mask[:, :, rows if mask.shape[2] > 1 else slice(None), keys]
    documents = None if masks.documents is None else masks.documents[:, keys]
    # The rows are the last ones of these keys, and distances do not change.
    return reference.attend(
        Call(
            query[:, :, rows],
            key[:, :, keys],
            value[:, :, keys],
            sink_logits[:, :, rows]
            if isinstance(sink_logits, Tensor) and sink_logits.shape[2] > 1
            else sink_logits,
            Masks(mask, masks.alibi_slopes, masks.window, documents),
            dropout_p,
            scale,
        )
    )
