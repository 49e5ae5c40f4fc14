"""Attention and hidden states under watch, while a model is distilled or measured.

The attention modules of a model compute what they always do, by the stock kernel and its logsumexp, and hand
over what the terms of the loss need; no dense map is made. Shapes: B batch, H query heads, KV key heads,
n tokens, d hidden size.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...attention import sink_attention
from ...hf.guard import numbered_layers
from ...inference.model import decoder_layers
from ...merging import merge_attention, partial_attention
from ...models.settings import WATCHED

FIRST_ROW = 8  # rows before it have few tokens to choose from


@dataclass
class Recorded:
    """What a softmax model does with the first token, by layer.

    Attributes:
        steady: which dimensions of its key to leave out of the scores, (head_dim,); None for none.
        scores: of each row on the first token, (B, H, n), -inf where the row does not see it.
        keys, values: of the first token, (B, KV, head_dim), (B, KV, value_dim).
        largest: largest magnitude of each token's hidden states, (B, n).
    """

    steady: Tensor | None = None
    scores: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    largest: dict[int, Tensor] = field(default_factory=dict)


@dataclass
class Pass:
    """One pass of the student, and what it adds to the loss.

    Attributes:
        real: which tokens are real, (B, n).
        alpha: how much of the prefix's value the sink still carries.
        values: the prefix's value of each layer, (KV, value_dim).
        bounds: of each watched layer, by its number: the largest magnitude that costs nothing, and the
            unit that the excess is told in.
        shares: of each layer, the mean attention on the first token.
        excesses: of each watched layer.
        open: takes what is found. Gradient checkpointing computes a layer again, and needs the same
            operations, but no second count.
    """

    real: Tensor
    alpha: float
    values: Mapping[int, Tensor]
    bounds: Mapping[int, tuple[float, float]]
    shares: dict[int, Tensor] = field(default_factory=dict)
    excesses: dict[int, Tensor] = field(default_factory=dict)
    open: bool = True


class Watch:
    """Watches the attention modules and the decoder layers of one model.

    Args:
        model: a StableMask model, one of PEFT's around it too.

    Raises:
        ValueError: its attention modules do not tell which layer they are in.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config(decoder=True)
        self.attention = numbered_layers(model, config)
        self.layers = decoder_layers(model)
        self._hooks: list[Any] = []

    def set(self, attend: Callable[..., Tensor] | None, seen: Recorded | Pass | None) -> None:
        """From now on, until the next call.

        Args:
            attend: :func:`softmax`, :func:`record` or :func:`with_fading_value`; None for what the model
                does without a watch.
            seen: what the last two fill.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for number, module in self.attention.items():
            setattr(module, WATCHED, None if attend is None else partial(attend, seen, number))
        if seen is not None:
            self._hooks = [
                layer.register_forward_hook(partial(_look, seen, number))
                for number, layer in enumerate(self.layers)
            ]

    @contextmanager
    def over(
        self, attend: Callable[..., Tensor] | None, seen: Recorded | Pass | None = None
    ) -> Iterator[Any]:
        """The same for a while, after which nothing is watched."""
        self.set(attend, seen)
        try:
            yield seen
        finally:
            self.set(None, None)


def _look(seen: Recorded | Pass, number: int, layer: nn.Module, inputs: Any, output: Any) -> None:
    hidden_states = output[0] if isinstance(output, tuple) else output
    if isinstance(seen, Recorded):
        seen.largest[number] = hidden_states.float().abs().amax(-1)
    elif number in seen.bounds:
        found = excess(hidden_states, seen.real, *seen.bounds[number])
        if seen.open:
            seen.excesses[number] = found


def softmax(
    seen: None, layer: int, query: Tensor, key: Tensor, value: Tensor, sink: Tensor, **masks: Any
) -> Tensor:
    """The model before it had a sink."""
    return sink_attention(query, key, value, query.new_full((1, 1), -torch.inf), **masks)


def record(
    seen: Recorded,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor,
    **masks: Any,
) -> Tensor:
    """The same, with what each row thinks of the first token."""
    scored = key if seen.steady is None else key.masked_fill(seen.steady, 0.0)
    seen.scores[layer] = first_scores(query, scored, **masks)
    seen.keys[layer] = key[:, :, 0].to(seen.scores[layer].dtype)
    seen.values[layer] = value[:, :, 0].to(seen.scores[layer].dtype)
    return softmax(None, layer, query, key, value, sink, **masks)


def with_fading_value(
    seen: Pass, layer: int, query: Tensor, key: Tensor, value: Tensor, sink: Tensor, **masks: Any
) -> Tensor:
    """Attention with a sink that has ``alpha`` times the prefix's value. Dropout is left out."""
    masks.pop("dropout_p", None)
    past = key.shape[2] - query.shape[2]
    out, lse = merge_attention([partial_attention(query, key, value, past=past, **masks)], sink)
    if seen.alpha:
        share = torch.exp(sink.to(lse.dtype) - lse)[..., None]
        of_heads = seen.values[layer].repeat_interleave(query.shape[1] // key.shape[1], 0)
        out = out + (seen.alpha * share * of_heads[:, None]).to(out.dtype)
    found = first_share(query, key, lse, seen.real, **masks)
    if seen.open:
        seen.shares[layer] = found
    return out


def first_share(query: Tensor, key: Tensor, lse: Tensor, real: Tensor, **masks: Any) -> Tensor:
    """Mean attention on the first token, over heads and the real rows from the eighth on, scalar.

    Its gradient is through the score alone, with the logsumexp held: the token is to be scored lower, not the
    others higher.

    Args:
        lse: logsumexp of all scores and the sink, (B, H, n).
        real: which rows count, (B, n).
    """
    scores = first_scores(query, key, **masks)
    lse = lse.detach().masked_fill(lse.detach() == -torch.inf, 0.0)
    shares = (scores - lse).clamp(max=0.0).exp()
    counted = real & (torch.arange(real.shape[1], device=real.device) >= FIRST_ROW)
    total = (shares * counted[:, None]).sum()
    return total / (counted.sum() * query.shape[1]).clamp(min=1)


def first_scores(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """The score of each row on its text's first token, (B, H, n), at least float32; -inf where it is not seen.

    Args:
        query, key: (B, H, n, head_dim), (B, KV, n, head_dim); rows and keys are the same tokens, and padding is
            on the right.
        attn_mask, window, alibi_slopes, scale: as in :func:`~stablemask.sink_attention`.
    """
    length, head_dim = query.shape[2:]
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = query.unflatten(1, (key.shape[1], -1)).to(dtype)
    scores = (grouped * key[:, :, None, :1].to(dtype)).sum(-1).flatten(1, 2)
    scores = scores * (head_dim**-0.5 if scale is None else scale)
    rows = torch.arange(length, device=query.device)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(dtype)[:, None] * rows
    if window is not None:
        scores = scores.masked_fill(rows >= window, -torch.inf)
    if attn_mask is not None:
        of_first = attn_mask[..., 0]
        scores = (
            scores.masked_fill(~of_first, -torch.inf)
            if of_first.dtype == torch.bool
            else scores + of_first.to(dtype)
        )
    return scores


def excess(hidden_states: Tensor, real: Tensor, bound: float, unit: float) -> Tensor:
    """By how much real tokens' hidden states exceed a bound: summed over tokens, mean over the rest, scalar.

    Summed, for a few values of a few tokens are what there is to find.

    Args:
        hidden_states: (B, n, d).
        real: (B, n).
    """
    over = (hidden_states.float().abs() - bound).clamp(min=0) / unit
    return (over * real[..., None]).sum() / (hidden_states.shape[0] * hidden_states.shape[2])
