"""Rounds, medians and ratios, and the measurements of the backends."""

import json
import statistics

import pytest

from stablemask.backends import BACKENDS
from stablemask.benchmarks import backends, timing
from stablemask.benchmarks.timing import Budget, fastest, interleave, summarise


def test_ratios_are_medians_over_the_rounds_both_ran_in():
    floor = {0: 1.0, 1: 2.0, 2: 4.0}
    assert summarise(floor, floor).ratio == 1.0
    ours = summarise({0: 1.1, 1: 2.6, 2: 4.0}, floor)
    assert ours.ms == 2600.0
    assert ours.ratio == round(statistics.median([1.1, 1.3, 1.0]), 3)
    assert ours.quartiles == (1.05, 1.2)
    slow = summarise({1: 6.0}, floor)
    assert (slow.ratio, slow.samples) == (3.0, 1)
    assert summarise(floor, None).ratio is None


def test_the_fastest_floor_is_the_one_ratios_are_taken_to():
    samples = {"a": {0: 2.0, 1: 2.0}, "b": {0: 1.0, 1: 1.5}, "c": {0: 0.1}}
    assert fastest(samples, ["a", "b", "missing"]) == samples["b"]
    assert fastest(samples, []) is None


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the timed functions move, by what they say they take."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    calls = []

    def takes(name, seconds):
        def function():
            calls.append(name)
            now[0] += seconds

        return function

    return takes, calls


def test_rounds_turn_and_slow_functions_miss_some(clock):
    takes, calls = clock
    functions = {"fast": takes("fast", 1.0), "twice": takes("twice", 2.0), "slow": takes("slow", 9)}
    samples = interleave(functions, Budget(1000.0), "cpu")
    assert sorted(samples["fast"]) == sorted(samples["twice"]) == list(range(11))
    assert sorted(samples["slow"]) == [0, 5, 10]
    assert samples["twice"][5] == 2.0
    measured = calls[3:]  # after one call each to learn how long they take
    assert measured[:3] == ["fast", "twice", "slow"]
    assert measured[3:5] == ["twice", "fast"]
    everywhere = interleave(functions, Budget(1000.0), "cpu", always=["slow"])
    assert len(everywhere["slow"]) == 11


def test_a_budget_bounds_the_rounds(clock):
    takes, _ = clock
    assert len(interleave({"a": takes("a", 2.0)}, Budget(10.0), "cpu")["a"]) == 5
    assert len(interleave({"a": takes("a", 20.0)}, Budget(10.0), "cpu")["a"]) == 3
    assert len(interleave({"a": takes("a", 20.0)}, Budget(10.0, min_rounds=1), "cpu")["a"]) == 1


def test_short_calls_are_timed_in_blocks(clock):
    takes, calls = clock
    samples = interleave({"a": takes("a", 1e-4)}, Budget(1.0), "cpu")
    assert len(calls) == 1 + 100 * len(samples["a"])
    assert samples["a"][0] == pytest.approx(1e-4)


def test_measurements_of_the_backends(tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "_BUDGET", Budget(0.001, min_rounds=1, max_rounds=1))
    found = backends.measure_backends("cpu", lengths=[48], caches=[64], dtypes=["float32"])
    kinds = ["causal", "mask", "alibi", "window", "documents"]
    assert [(m["kind"], m["pass"]) for m in found] == [
        (kind, of_pass) for kind in kinds for of_pass in ("inference", "training", "decode")
    ]
    for entry in found:
        shape = (1, 64) if entry["pass"] == "decode" else (48, 48)
        assert (entry["q_len"], entry["kv_len"]) == shape
        assert (entry["device"], entry["dtype"]) == ("cpu", "float32")
        assert {"flash", "reference"} <= entry["milliseconds"].keys() <= BACKENDS.keys()
        assert all(ms > 0 for ms in entry["milliseconds"].values())

    path = backends.save_json({"measurements": found}, tmp_path / "new" / "cpu.json")
    assert json.loads(path.read_text())["measurements"] == found
    assert [file.name for file in path.parent.iterdir()] == ["cpu.json"]
