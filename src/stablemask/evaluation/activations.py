"""Outliers among hidden states, by layer: how large, how heavy-tailed, and on which token.

A token that serves as an attention sink carries a few enormous activations (Sun et al., "Massive
Activations in Large Language Models", 2024, arXiv 2402.17762), which spend the range of a
quantiser. Shapes: L layers, n tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..inference.model import decoder_layers, evaluating
from ..models.presets import FRONT_TOKENS
from .perplexity import check_sequences


class HiddenStateOutliers(NamedTuple):
    """What each decoder layer puts out, the residual stream behind it.

    Attributes:
        largest: largest magnitude, (L,).
        largest_later: the same without the first token of each sequence, nor one in front of it, (L,).
        kurtosis: fourth central moment over the squared variance of all entries, (L,); 3 for a
            normal distribution.
    """

    largest: Tensor
    largest_later: Tensor
    kurtosis: Tensor


def hidden_state_outliers(model: PreTrainedModel, input_ids: Tensor) -> HiddenStateOutliers:
    """Largest magnitude and kurtosis of the hidden states of any decoder of Transformers.

    Args:
        model: a decoder-only model whose layers are one ``nn.ModuleList``.
        input_ids: sequences without padding, (batch, n) with n of at least 2. They are read one at
            a time, so memory does not grow with their number.

    Returns:
        float64 tensors on the CPU.

    Raises:
        InputError: the shape is another, the ids do not fit the model, or its layers are not found.
    """
    check_sequences(model, input_ids)
    with capture_outliers(model) as outliers, evaluating(model):
        for sequence in input_ids.to(model.device):
            model(input_ids=sequence[None], use_cache=False)
    return outliers()


@contextmanager
def capture_outliers(model: PreTrainedModel) -> Iterator[Callable[[], HiddenStateOutliers]]:
    """A function that gives the outliers of all that runs inside the ``with`` block, a sequence a pass.

    Raises:
        InputError: the model's layers are not found.
    """
    layers = decoder_layers(model)
    first = 1 + (getattr(model.config, "attention", None) in FRONT_TOKENS)
    statistics = [_Statistics(first) for _ in layers]
    hooks = [
        layer.register_forward_hook(
            lambda module, args, output, add=statistic.add: add(
                output[0] if isinstance(output, tuple) else output
            )
        )
        for layer, statistic in zip(layers, statistics, strict=True)
    ]
    try:
        yield lambda: HiddenStateOutliers(
            largest=torch.stack([layer.largest for layer in statistics]),
            largest_later=torch.stack([layer.largest_later for layer in statistics]),
            kurtosis=torch.stack([layer.kurtosis() for layer in statistics]),
        )
    finally:
        for hook in hooks:
            hook.remove()


class _Statistics:
    """Extremes and power sums of what one layer puts out, over sequences."""

    def __init__(self, first: int) -> None:
        self.first = first  # rows that are not later ones
        self.largest = torch.zeros((), dtype=torch.float64)
        self.largest_later = torch.zeros((), dtype=torch.float64)
        self.count = 0
        self.sums = torch.zeros(4, dtype=torch.float64)

    def add(self, hidden_states: Tensor) -> None:
        """``hidden_states``: (1, n, hidden), the token in front among them where there is one."""
        values = hidden_states[0].double().cpu()
        self.largest = torch.maximum(self.largest, values.abs().max())
        self.largest_later = torch.maximum(self.largest_later, values[self.first :].abs().max())
        self.count += values.numel()
        squares = values * values
        powers = (values, squares, squares * values, squares * squares)
        self.sums += torch.stack([power.sum() for power in powers])

    def kurtosis(self) -> Tensor:
        mean, square, cube, fourth = self.sums / self.count
        variance = square - mean**2
        return (fourth - 4 * mean * cube + 6 * mean**2 * square - 3 * mean**4) / variance**2
