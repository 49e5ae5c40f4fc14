"""What is read off attention: sinks, the mask ratio, what tokens receive, and lost positions.

Shapes: L layers, H heads, n tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import InputError
from .attention_maps import AttentionMaps, LayerAttention, last_hidden_state, reduce_attention


@dataclass(frozen=True)
class LayerStatistics:
    """What the heads of one layer do with one sequence, on the CPU in float32.

    Attributes:
        layer: its number in the model.
        first_token: mean attention on token 0, over the rows that have a choice, (H,).
        pseudo: what each row gives to the mass without value, (H, n); 0 for softmax.
        received: mean attention that a token gets from the rows after it, (H, n - 1); the last token
            has none.
    """

    layer: int
    first_token: Tensor
    pseudo: Tensor
    received: Tensor

    @classmethod
    def of(cls, attention: LayerAttention) -> "LayerStatistics":
        """The statistics of one sequence of 2 tokens or more."""
        real = attention.real[0]
        rows_after = torch.arange(real.shape[-1] - 1, 0, -1, device=real.device)
        received = real.tril(-1).sum(-2)[:, :-1] / rows_after
        return cls(
            layer=attention.layer,
            first_token=received[:, 0].float().cpu(),
            pseudo=attention.pseudo[0].float().cpu(),
            received=received.float().cpu(),
        )


class IdenticalTokens(NamedTuple):
    """Final hidden states by position, (n, hidden), and the largest deviation from position 0."""

    outputs: Tensor
    spread: float


def even_first_token(length: int) -> float:
    """The mean attention on token 0 of rows that attend evenly, row 0 left out; ``length`` > 1."""
    return sum(1 / row for row in range(2, length + 1)) / (length - 1)


def layer_statistics(model: PreTrainedModel, input_ids: Tensor) -> list[LayerStatistics]:
    """The statistics of each layer on one sequence, in the memory of one layer's weights, H n^2.

    Args, Raises: as in :func:`reduce_attention`; InputError also for less than 2 tokens.
    """
    if input_ids.numel() < 2:
        raise InputError(f"the sequence must have at least 2 tokens, got {input_ids.numel()}")
    return reduce_attention(model, input_ids, LayerStatistics.of)


def first_token_attention(maps: AttentionMaps) -> Tensor:
    """Mean attention on token 0 by layer, (L,), over all heads and the rows that have a choice.

    Row 0 is left out: token 0 is all it sees. ``.mean()`` is the figure for the whole model.
    """
    return maps.real[:, :, 1:, 0].mean(dim=(1, 2))


def real_share(maps: AttentionMaps) -> float:
    """Mean share of its attention that a row gives to real tokens, 1 for plain softmax."""
    return maps.real.sum(-1).mean().item()


def identical_token_spread(
    model: PreTrainedModel, length: int, token_id: int = 0
) -> IdenticalTokens:
    """Feed one token ``length`` times and see whether the model can tell the positions apart.

    With only relative positions and plain softmax every row averages equal values, and the spread
    is rounding error; the mass that falls with the row makes it grow. (Yin et al., section 3.)

    Raises:
        InputError: not a language model, ``length`` below 1 or past a learned position table, or no
            such token.
    """
    if length < 1:
        raise InputError(f"length must be at least 1, got {length}")
    outputs = last_hidden_state(model, torch.full((length,), token_id)).float().cpu()
    return IdenticalTokens(outputs, (outputs - outputs[0]).abs().max().item())
