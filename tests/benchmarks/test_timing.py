"""Rounds, medians and ratios, and the file they are kept in."""

import itertools
import json
import math
import statistics

import pytest

from benchmarks import timing
from benchmarks.environment import save_json
from benchmarks.timing import Budget, fastest, interleave, summarise, timer


def test_ratios_are_medians_over_the_rounds_both_ran_in():
    floor = {0: 1.0, 1: 2.0, 2: 4.0}
    assert summarise(floor, floor).ratio == 1.0
    ours = summarise({0: 1.1, 1: 2.6, 2: 4.0}, floor)
    assert ours.ms == 2600.0
    assert ours.ratio == round(statistics.median([1.1, 1.3, 1.0]), 3)
    assert ours.quartiles == (1.05, 1.2)
    slow = summarise({1: 6.0}, floor)
    assert (slow.ratio, slow.samples) == (3.0, 1)
    assert summarise(floor, {0: 0.5, 2: 1.0}).ratio == 3.0
    assert summarise(floor, None).ratio is None


def test_the_fastest_floor_is_the_one_ratios_are_taken_to():
    samples = {"a": {0: 2.0, 1: 2.0}, "b": {0: 1.0, 1: 1.5}, "c": {0: 0.1}}
    assert fastest(samples, ["a", "b", "missing"]) == samples["b"]
    assert fastest(samples, []) is None


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the timed functions move, by what they say they take, and the order of calls."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    calls = []

    def takes(name, seconds):
        def function():
            calls.append(name)
            now[0] += seconds

        return timer(function, "cpu")

    return takes, calls


def test_rounds_turn_and_others_miss_some(clock):
    takes, calls = clock
    functions = {
        "floor": takes("floor", 1.0),
        "ours": takes("ours", 2.0),
        "other": takes("other", 9),
    }
    budget = Budget(0.0, min_rounds=7)
    samples = interleave(functions, budget, floors=["floor"], watched=["ours"])
    assert sorted(samples["floor"]) == sorted(samples["ours"]) == list(range(7))
    assert sorted(samples["other"]) == [0, 3, 6]
    assert samples["ours"][5] == 2.0
    assert calls[:3] == ["floor", "ours", "other"]
    assert calls[3:5] == ["ours", "floor"]


def test_seconds_bound_the_rounds_after_the_least(clock):
    takes, _ = clock

    def rounds(of_a_call, **budget):
        samples = interleave(
            {"a": takes("a", of_a_call)}, Budget(**budget), floors=[], watched=["a"]
        )
        return len(samples["a"])

    assert rounds(2.0, seconds=10.0) == 4 + 5
    assert rounds(20.0, seconds=10.0) == 4
    assert rounds(20.0, seconds=10.0, min_rounds=1) == 1
    assert rounds(2.0, seconds=1e6) == 101


def test_what_is_watched_goes_on_until_its_ratio_is_known(clock):
    takes, _ = clock

    def rounds(ours):
        others = {"near": takes("near", 1.2), "far": takes("far", 1.4)}
        functions = {"floor": takes("floor", 1.0), "ours": ours, **others}
        return interleave(functions, Budget(1e6, min_rounds=7), floors=["floor"], watched=["ours"])

    steady = rounds(takes("ours", 1.0))
    assert [len(steady[name]) for name in ("floor", "ours", "far")] == [7, 7, 3]
    quick, slow = takes("ours", 1.0), takes("ours", 1.04)
    turn = itertools.cycle([quick, slow])
    noisy = rounds(lambda calls: next(turn)(calls))
    assert len(noisy["ours"]) == len(noisy["floor"]) > 7
    assert len(noisy["near"]) == 3 + len(noisy["ours"]) - 7
    assert len(noisy["far"]) == 3
    # The quartiles lie 0.04 apart, a deviation of 0.03, and the error falls with the root of the rounds.
    error = 0.04 / 1.349 * math.sqrt(math.pi / 2)
    assert error / math.sqrt(len(noisy["ours"])) <= timing.PRECISION
    assert error / math.sqrt(len(noisy["ours"]) - 2) > timing.PRECISION


def test_short_calls_are_timed_in_blocks(clock):
    takes, calls = clock
    samples = interleave({"a": takes("a", 1e-4)}, Budget(0.0), floors=[], watched=["a"])
    assert len(calls) == 1 + 100 * len(samples["a"])
    assert samples["a"][0] == pytest.approx(1e-4)


def test_a_result_is_written_whole(tmp_path):
    result = {"benchmark": "attention", "attention": [{"ms": 1.5}, {"ms": math.nan}], "seconds": {}}
    path = tmp_path / "new" / "cpu.json"
    save_json(result, path)
    assert json.loads(path.read_text()) == result | {"attention": [{"ms": 1.5}, {"ms": None}]}
    assert [file.name for file in path.parent.iterdir()] == ["cpu.json"]
