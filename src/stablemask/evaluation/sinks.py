"""Where our decoder's attention goes: maps with their pseudo share, sinks, and lost positions.

The fast kernels store no attention map, so the maps are computed again, densely and in float32,
from what each layer's attention was called with. Shapes: L layers, H heads, n tokens.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..inference.model import check_length, check_token_ids, evaluating
from ..models import StableMaskForCausalLM, StableMaskModel
from ..models.modeling import StableMaskAttention

Decoder = StableMaskForCausalLM | StableMaskModel


class AttentionMaps(NamedTuple):
    """Attention of one sequence; ``real.sum(-1) + pseudo`` is 1 in every row.

    Attributes:
        real: what row i gives to each real token, (L, H, n, n), float32.
        pseudo: what row i gives to the valueless mass, the mask ratio M / (Z + M), (L, H, n).
    """

    real: Tensor
    pseudo: Tensor


class IdenticalTokens(NamedTuple):
    """Final hidden states by position, (n, hidden), and the largest deviation from position 0."""

    outputs: Tensor
    spread: float


def attention_maps(model: Decoder, input_ids: Tensor) -> AttentionMaps:
    """The attention of every layer and head on one sequence without padding, on the CPU.

    Args:
        model: our decoder, with any attention kind and position encoding.
        input_ids: (n,) or (1, n). Memory grows with L H n^2.

    Raises:
        InputError: not our decoder, not one sequence, or longer than a learned position table.
    """
    decoder = _decoder(model)
    if input_ids.dim() not in (1, 2) or (input_ids.dim() == 2 and len(input_ids) != 1):
        raise InputError(
            f"input_ids must be one sequence, (n,) or (1, n), got {tuple(input_ids.shape)}"
        )
    maps = []
    with _attention_inputs(decoder) as calls:
        _hidden_states(decoder, input_ids.reshape(-1))
        for module, hidden_states, inputs in calls:
            maps.append(_attention_map(module, hidden_states, **inputs))
    real, pseudo = zip(*maps, strict=True)
    return AttentionMaps(torch.stack(real), torch.stack(pseudo))


def first_token_attention(maps: AttentionMaps) -> Tensor:
    """Mean attention on token 0 by layer, (L,), over all heads and the rows that have a choice.

    Row 0 is left out: token 0 is all it sees. ``.mean()`` is the figure for the whole model.
    """
    return maps.real[:, :, 1:, 0].mean(dim=(1, 2))


def real_share(maps: AttentionMaps) -> float:
    """Mean share of its attention that a row gives to real tokens, 1 for plain softmax."""
    return maps.real.sum(-1).mean().item()


def identical_token_spread(model: Decoder, length: int, token_id: int = 0) -> IdenticalTokens:
    """Feed one token ``length`` times and see whether the model can tell the positions apart.

    With only relative positions and plain softmax every row averages equal values, and the spread
    is rounding error; the mass that falls with the row makes it grow. (Yin et al., section 3.)

    Raises:
        InputError: not our decoder, ``length`` below 1 or past a learned position table, or no such
            token.
    """
    if length < 1:
        raise InputError(f"length must be at least 1, got {length}")
    decoder = _decoder(model)
    outputs = _hidden_states(decoder, torch.full((length,), token_id)).float().cpu()
    return IdenticalTokens(outputs, (outputs - outputs[0]).abs().max().item())


def _decoder(model: Any) -> StableMaskModel:
    decoder = model.model if isinstance(model, StableMaskForCausalLM) else model
    if not isinstance(decoder, StableMaskModel):
        raise InputError(
            f"attention maps are computed for stablemask models, got {type(model).__name__}"
        )
    return decoder


def _hidden_states(decoder: StableMaskModel, ids: Tensor) -> Tensor:
    """(n, hidden) of one sequence (n,), without cache, mask or dropout."""
    check_length(decoder, len(ids), f"a sequence of {len(ids)} tokens")
    check_token_ids(decoder, int(ids.max()))
    with evaluating(decoder):
        return decoder(input_ids=ids[None].to(decoder.device), use_cache=False).last_hidden_state[0]


@contextmanager
def _attention_inputs(
    decoder: StableMaskModel,
) -> Iterator[list[tuple[StableMaskAttention, Tensor, dict[str, Any]]]]:
    """Collects what each attention module is called with, layer by layer."""
    calls: list[tuple[StableMaskAttention, Tensor, dict[str, Any]]] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((module, args[0], kwargs)), with_kwargs=True
        )
        for module in decoder.modules()
        if isinstance(module, StableMaskAttention)
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _attention_map(
    module: StableMaskAttention,
    hidden_states: Tensor,
    *,
    sink_logits: Tensor | None,
    rotary: tuple[Tensor, Tensor] | None,
    alibi_slopes: Tensor | None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """(H, n, n) on the real tokens and (H, n) on the mass, of one layer."""
    query, key, _value = module.project(hidden_states, rotary)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query[0].float() @ key[0].float().mT * module.head_dim**-0.5
    heads, n, _n = scores.shape
    row = torch.arange(n, device=scores.device)
    distance = row[:, None] - row
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[:, None, None] * distance
    scores = scores.masked_fill(distance < 0, -torch.inf)
    sinks = module.sinks[:, None] if sink_logits is None else sink_logits  # type: ignore[index]
    sink = sinks.float().reshape(-1, sinks.shape[-1]).expand(heads, n)[..., None]
    weights = torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1).cpu()
    return weights[..., :-1], weights[..., -1]
