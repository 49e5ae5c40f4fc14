"""Means over seeds and how far they can be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from .perplexity import perplexity_text

# Student's t, two-sided 95 %, by degrees of freedom.
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093,
)  # fmt: skip


class Estimate(NamedTuple):
    """A mean over seeds, and half the width of its 95 % interval by Student's t (nan for one seed)."""

    mean: float
    half_width: float

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    def below(self, limit: float, margin: float = math.inf) -> bool | None:
        """Whether it is below ``limit`` beyond doubt, the whole interval.

        None where only the mean is, by more than ``margin``, or where there is one seed.
        """
        if math.isnan(self.half_width):
            return None
        return True if self.high < limit else None if self.mean < limit - margin else False

    def text(self, digits: int, scale: float = 1.0) -> str:
        mean = perplexity_text(scale * self.mean, digits)
        if math.isnan(self.half_width):
            return mean
        return f"{mean} ± {perplexity_text(scale * self.half_width, digits)}"


def estimate(values: Sequence[float]) -> Estimate:
    """Of one measurement a seed."""
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return Estimate(mean, math.nan)
    variance = sum((value - mean) * (value - mean) for value in values) / (count - 1)
    # Past the table it nears the normal's 1.96; to 0.001 as here.
    quantile = _T95[count - 2] if count - 2 < len(_T95) else 1.96 + 2.5 / (count - 1)
    return Estimate(mean, quantile * math.sqrt(variance / count))
