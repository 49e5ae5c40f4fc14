"""Intervals of means over seeds."""

import math

import pytest

from stablemask.evaluation.statistics import estimate


@pytest.mark.parametrize(
    ("count", "quantile"),
    [(2, 12.706), (5, 2.776), (20, 2.093), (21, 2.086), (31, 2.042), (61, 2.000), (121, 1.980)],
)
def test_half_a_width_is_that_of_students_t(count, quantile):
    """Two-sided, 95 %, as tables have it. Of 0 and 1 in turn with a mean of m the variance is m (1 - m) n / (n - 1)."""
    values = [number % 2 for number in range(count)]
    mean = sum(values) / count
    found = estimate(values)
    assert found.mean == mean
    expected = quantile * math.sqrt(mean * (1 - mean) / (count - 1))
    assert found.half_width == pytest.approx(expected, rel=1e-3)
