"""The definition, pseudo columns and all, put in the place of a model's own eager attention."""

import sys
from unittest.mock import patch

import torch
from torch import Tensor

from stablemask import head_decay_rates

FAR = 40.0  # exp(-40) is the first pseudo score left out of a row that goes on for ever


def dense_attention(positions: Tensor, settings: dict | None):
    """An ``eager_attention_forward`` in float64: softmax over real, pseudo and learned columns.

    Args:
        positions: the place of each row in its own text, (batch or 1, q).
        settings: as ``config.stablemask`` holds them, the shifts of a layer as a tensor too; or None for
            no pseudo columns.
    """

    def forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        assert not dropout
        groups = query.shape[1] // key.shape[1]
        key, value = (t.double().repeat_interleave(groups, 1) for t in (key, value))
        if scaling is None:
            scaling = query.shape[-1] ** -0.5
        scores = query.double() @ key.transpose(-2, -1) * scaling
        if attention_mask is not None:  # finfo.min where hidden
            scores = scores + attention_mask
            scores = scores.masked_fill(attention_mask < -1e30, -torch.inf)
        columns = [scores]
        if settings is not None:
            shift = settings.get("shift", 0.0)
            if isinstance(shift, list):
                shift = shift[module.layer_idx]
            of_layer = settings | {"shift": shift}
            columns.append(_pseudo_columns(positions, query.shape[1], **of_layer))
        if kwargs.get("s_aux") is not None:
            columns.append(kwargs["s_aux"].double()[:, None, None])
        rows = scores.shape[:-1]
        weights = torch.cat([c.expand(*rows, c.shape[-1]) for c in columns], -1).softmax(-1)
        weights = weights[..., : key.shape[2]]
        # A row of padding sees nothing.
        weights = weights.masked_fill(scores.isneginf().all(-1, keepdim=True), 0.0)
        return (weights @ value).transpose(1, 2).contiguous().to(query.dtype), None

    return forward


def _pseudo_columns(
    positions, heads, gamma, horizon=None, start=0, shift=0.0, hold=None, suffix=False
):
    """(batch, heads, q, horizon): ``-gamma * j`` behind a row's place, nothing up to it; past
    ``hold`` those of that place. With a suffix, rows that have none get one of ``-gamma * i``."""
    if gamma == "slopes":
        gamma = head_decay_rates(heads)
    rate, shift = (
        torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1, 1) for t in (gamma, shift)
    )
    if horizon is None:
        horizon = int(positions.max()) + 2 + int(FAR / rate.min())
    column = torch.arange(horizon)
    place = positions[:, None, :, None]
    falls_to = place if hold is None else place.clamp(max=hold)
    scores = torch.where((column > falls_to) & (place >= start), shift - rate * column, -torch.inf)
    if suffix:
        behind = torch.where(falls_to >= horizon - 1, shift - rate * falls_to, -torch.inf)
        scores = torch.cat((scores, behind), -1)
    return scores


def densely(model, positions: Tensor, settings: dict | None):
    """A context in which the model's eager attention is the definition."""
    assert model.config._attn_implementation == "eager"
    module = sys.modules[type(model).__module__]
    return patch.object(module, "eager_attention_forward", dense_attention(positions, settings))
