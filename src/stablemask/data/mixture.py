"""Several datasets drawn from by weight, in an order that needs no state."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from stablemask.data.packing import PackedDataset
from stablemask.errors import InputError

WINDOW = 10_000


class Mixture:
    """An endless mixture of datasets, whose samples are numbered from 0.

    Every ``WINDOW`` samples hold each dataset as often as its weight says, rounded by the largest
    remainder, and spread evenly: a shorter run of samples has a share that is off by a sample or two.

    Attributes:
        datasets: what is mixed.
        weights: of each dataset, its share of the samples, of a sum of 1.
        counts: of each dataset, its samples in a window.
    """

    def __init__(
        self, datasets: Sequence[PackedDataset], weights: Sequence[float], seed: int = 0
    ) -> None:
        self.datasets = list(datasets)
        self.weights = [weight / math.fsum(weights) for weight in weights]
        self.counts = _largest_remainder(self.weights, WINDOW)
        self.seed = seed
        # Of each sample of a window before it is put in order: its dataset, and which of its it is.
        self._sources = np.repeat(np.arange(len(self.counts)), self.counts)
        self._ranks = np.concatenate([np.arange(count) for count in self.counts])
        self._window, self._order = -1, np.empty(0, np.int64)  # the order that is kept

    @property
    def num_tokens(self) -> int:
        return sum(dataset.num_tokens for dataset in self.datasets)

    def locate(self, k: int) -> tuple[int, int]:
        """Of sample ``k``, its dataset, and how many samples of that dataset come before it."""
        window, place = divmod(k, WINDOW)
        if window != self._window:
            self._window, self._order = window, self._order_of(window)
        index = self._order[place]
        source = int(self._sources[index])
        return source, window * self.counts[source] + int(self._ranks[index])

    def _order_of(self, window: int) -> np.ndarray:
        """Cut the window into as many equal parts as a dataset has samples; one falls in each part."""
        random = np.random.PCG64([self.seed, window]).random_raw(WINDOW) / 2.0**64
        places = (self._ranks + random) / np.take(self.counts, self._sources)
        return np.argsort(places, kind="stable")


def parse_mixture(mixture: Sequence[str]) -> dict[str, float]:
    """The weights of sources given as ``SOURCE=WEIGHT``.

    Raises:
        InputError: there is none, an item has another form, a source is given twice, or a weight is
            not positive or too small beside the others.
    """
    if not mixture:
        raise InputError("a mixture is empty; each of its items is SOURCE=WEIGHT")
    weights: dict[str, float] = {}
    for item in mixture:
        source, _, number = item.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not source or not 0 < weight < math.inf:
            raise InputError(
                f"{item!r} of the mixture is not SOURCE=WEIGHT, with a weight greater than 0"
            )
        if source in weights:
            raise InputError(f"the mixture has {source!r} twice")
        weights[source] = weight
    total = math.fsum(weights.values())
    counts = _largest_remainder([weight / total for weight in weights.values()], WINDOW)
    for (source, weight), count in zip(weights.items(), counts, strict=True):
        if count == 0:
            raise InputError(
                f"{source!r} has a weight of {weight:g} in a mixture of {total:g}; at least one "
                f"sample in {WINDOW:,} must be its"
            )
    return weights


def _largest_remainder(shares: Sequence[float], size: int) -> list[int]:
    """Whole parts of ``size`` in proportion to ``shares``, whose sum is 1."""
    counts = [math.floor(share * size) for share in shares]
    remainders = [share * size - count for share, count in zip(shares, counts, strict=True)]
    largest = sorted(range(len(shares)), key=lambda i: -remainders[i])
    for i in largest[: size - sum(counts)]:
        counts[i] += 1
    return counts
