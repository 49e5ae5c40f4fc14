"""The definition, dense and slow: every score is stored, and autograd does the rest.

Shapes: B batch, H query heads, K key heads, n query rows, m keys, D head_dim, V value_dim.
It runs on every device and dtype, serves every call and can be differentiated twice. Half precision is
computed in float32.
"""

import torch
from torch import Tensor

from ..call import Call
from .calls import autocast_is_on


def unsupported(call: Call) -> str | None:
    return None


def attend(call: Call) -> Tensor:
    """Softmax over the visible scores and the sink logit, of which only the former carry values."""
    device = call.query.device.type
    if autocast_is_on(device):
        # The tensors have autocast's dtype already; the products within are not for it to round.
        with torch.autocast(device, enabled=False):
            return _attend(call)
    return _attend(call)


def _attend(call: Call) -> Tensor:
    query, key, value, _, masks, dropout_p, scale, _ = call
    num_groups = query.shape[1] // key.shape[1]
    dtype = query.dtype
    if dtype != torch.float64:
        query, key, value = query.float(), key.float(), value.float()
    key = key.repeat_interleave(num_groups, dim=1)
    value = value.repeat_interleave(num_groups, dim=1)
    n, m = query.shape[2], key.shape[2]

    scores = query @ key.transpose(-2, -1) * scale  # B H n m
    bias = masks.bias(slice(0, n), slice(0, m), m - n, dtype=query.dtype, device=query.device)
    if bias is not None:
        scores = scores + bias
    future = torch.ones(n, m, dtype=torch.bool, device=query.device).triu(m - n + 1)
    # Selected, not multiplied: an infinite score times zero would be NaN.
    scores = scores.masked_fill(future, -torch.inf)

    sink = call.sinks().to(scores.dtype).unsqueeze(-1).expand(*scores.shape[:-1], 1)
    logits = torch.cat([scores, sink], dim=-1)
    # A row that sees nothing, not even a sink, has no softmax; its output is 0.
    empty = (logits == -torch.inf).all(-1, keepdim=True)
    # An infinite sink takes the whole row; 0 and -inf give the same split without inf - inf.
    full = sink == torch.inf
    column = torch.arange(m + 1, device=query.device)
    taken = logits.new_zeros(m + 1).masked_fill(column < m, -torch.inf)
    logits = torch.where(full, taken, logits)
    weights = torch.softmax(logits.masked_fill(empty, 0.0), dim=-1).masked_fill(empty, 0.0)
    weights = weights[..., :m]
    if dropout_p > 0:
        weights = torch.dropout(weights, dropout_p, True)
    return (weights @ value).to(dtype)
