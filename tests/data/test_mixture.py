"""The order in which a mixture draws from its datasets."""

from collections import Counter

import numpy as np
import pytest

from stablemask.data import Mixture, PackedDataset
from stablemask.data.mixture import WINDOW


def mixture(*weights: float, seed: int = 0) -> Mixture:
    blocks = [PackedDataset(np.arange(64, dtype=np.uint16), 8) for _ in weights]
    return Mixture(blocks, weights, seed)


@pytest.mark.parametrize(
    ("weights", "counts"),
    [
        ((1,), [10000]),
        ((3, 1), [7500, 2500]),
        ((1, 1, 1), [3334, 3333, 3333]),
        ((0.7, 0.2, 0.0999, 0.0001), [7000, 2000, 999, 1]),
        ((7e9, 2e9, 1e9), [7000, 2000, 1000]),
    ],
)
def test_every_window_holds_the_weights(weights, counts):
    mixed = mixture(*weights)
    for window in (0, 1, 2**40):
        numbers = range(window * WINDOW, (window + 1) * WINDOW)
        drawn = [mixed.locate(k) for k in numbers]
        assert [Counter(source for source, _ in drawn)[i] for i in range(len(weights))] == counts
        for i, count in enumerate(counts):  # and each dataset goes on where it had stopped
            expected = range(window * count, (window + 1) * count)
            assert [n for source, n in drawn if source == i] == list(expected)


def test_any_sample_at_any_time():
    first, second = mixture(5, 3, 2), mixture(5, 3, 2)
    in_order = [first.locate(k) for k in range(3 * WINDOW)]
    for k in np.random.default_rng(0).permutation(3 * WINDOW)[:100].tolist():
        assert second.locate(k) == in_order[k]


def test_short_runs_of_samples_hold_the_weights_too():
    mixed = mixture(0.5, 0.3, 0.2)
    sources = np.array([mixed.locate(k)[0] for k in range(2 * WINDOW)])
    for start in range(0, 2 * WINDOW - 100, 37):
        counts = np.bincount(sources[start : start + 100], minlength=3)
        assert np.abs(counts - [50, 30, 20]).max() <= 3


def test_order_is_random_and_the_seeds():
    drawn = [[mixture(1, 1, seed=s).locate(k) for k in range(1000)] for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    mixed = mixture(1, 1)
    windows = [[mixed.locate(k + w * WINDOW)[0] for k in range(1000)] for w in (0, 1)]
    assert windows[0] != windows[1]
    switches = np.diff(windows[0]) != 0
    assert 0.6 < switches.mean() < 0.9  # neither in blocks nor in turn
