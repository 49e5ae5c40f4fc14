"""What a model does with texts, in one pass over them: its loss, its attention sink, its outliers.

A model that was trained with softmax reads best with the token in front that serves it as its sink; then
that token, its *prefix*, is the first it reads, and the losses are still those of the text alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..bars import progress_bar
from ..errors import InputError
from ..inference.model import evaluating
from .activations import capture_outliers
from .attention_maps import LayerAttention, capture_attention
from .perplexity import check_sequences, perplexity_of, token_losses
from .sinks import LayerStatistics


@dataclass(frozen=True)
class SinkSummary:
    """Means over sequences; a list has a number for each layer that has attention, or as said.

    Attributes:
        nats: mean loss of each sequence's tokens but the first, a number for each sequence.
        first_token: attention on the first token that is read, over heads and the rows after it.
        top_token: attention on whichever token of the sequence's first half gets most, by head and
            sequence, over the rows after it; a sink may sit elsewhere than on the first token.
        pseudo: what rows give to the mass without value, over heads and rows.
        largest: largest magnitude behind each decoder layer.
        kurtosis: of all entries behind each decoder layer, 3 for a normal distribution.
    """

    nats: list[float]
    first_token: list[float]
    top_token: list[float]
    pseudo: list[float]
    largest: list[float]
    kurtosis: list[float]

    @property
    def perplexity(self) -> float:
        return perplexity_of(sum(self.nats) / len(self.nats))

    @property
    def mean_first_token(self) -> float:
        return sum(self.first_token) / len(self.first_token)

    @property
    def worst_first_token(self) -> float:
        """In the layer that gives the first token most."""
        return max(self.first_token)

    @property
    def largest_activation(self) -> float:
        """Of what a layer reads: behind the last there is a normalisation, and no layer."""
        return max(self.largest[:-1] or self.largest)

    @property
    def worst_kurtosis(self) -> float:
        """Of the same."""
        return max(self.kurtosis[:-1] or self.kurtosis)


def sink_summary(
    model: PreTrainedModel, ids: Tensor, prefix: int | None = None, *, progress: bool = True
) -> SinkSummary:
    """Read sequences one at a time and sum up what the model does with them.

    Args:
        model: a decoder whose attention goes through Transformers' attention interface, or ours; one that
            PEFT wraps is given as ``model.get_base_model()``.
        ids: sequences without padding, (batch, n) with n of at least 2.
        prefix: token id to put in front of each sequence that does not begin with it. Whatever is in
            front, the tokens that are scored are the same.
        progress: show a bar, where stderr is a terminal.

    Raises:
        InputError: the shape is another, the ids do not fit the model, its attention cannot be captured,
            or its loss is not finite.
    """
    check_sequences(model, ids, prefix)
    by_layer: dict[int, list[tuple[float, float, float]]] = {}

    def record(attention: LayerAttention) -> None:
        one = LayerStatistics.of(attention)
        half = one.received[:, : (one.received.shape[1] + 1) // 2]
        shares = (one.first_token.mean(), half.amax(-1).mean(), one.pseudo.mean())
        by_layer.setdefault(one.layer, []).append(tuple(share.item() for share in shares))  # type: ignore[arg-type]

    nats = []
    with (
        evaluating(model),
        capture_attention(model, record),
        capture_outliers(model) as outliers,
        progress_bar(total=len(ids), unit="text", leave=False, show=progress) as bar,
    ):
        for sequence in ids:
            nats.append(token_losses(model, sequence[None], prefix).mean().item())
            bar.update()
    if not all(map(math.isfinite, nats)):
        raise InputError(
            "the model's loss is not finite; its weights are damaged, or its dtype overflows"
        )
    shares = torch.tensor([by_layer[number] for number in sorted(by_layer)]).double().mean(dim=1)
    first_token, top_token, pseudo = shares.T.tolist()
    found = outliers()
    return SinkSummary(
        nats, first_token, top_token, pseudo, found.largest.tolist(), found.kurtosis.tolist()
    )
