"""The benchmarks run and say what they mean; how fast a machine is belongs to no test."""

import json
import statistics

import pytest
import torch

from stablemask.benchmarks import attention
from stablemask.benchmarks.memory import peak_memory
from stablemask.benchmarks.training import measure_training
from stablemask.cli.bench import BenchOptions, run
from stablemask.errors import InputError
from tests import marks

CPU = torch.device("cpu")


def test_correctness_comes_first(monkeypatch):
    assert attention.check() < 1e-6
    wrong = attention.stable_mask_attention
    monkeypatch.setattr(attention, "stable_mask_attention", lambda *t, **k: wrong(*t, **k) * 1.001)
    with pytest.raises(AssertionError, match="from the definition"):
        attention.check()


def test_ratios_are_medians_over_rounds():
    times = {("sdpa", "both"): [1.0, 2.0, 4.0], ("stablemask", "both"): [1.1, 2.6, 4.0]}
    assert attention._summary(times, "sdpa", "both") == (2000.0, 1.0)
    milliseconds, ratio = attention._summary(times, "stablemask", "both")
    assert milliseconds == 2600.0
    assert ratio == round(statistics.median([1.1, 1.3, 1.0]), 3)


@marks.proc
def test_memory_is_linear_in_length_and_the_definition_is_not():
    one_score_matrix = 8 * 16384 * 16384 * 4 / 2**20
    sdpa = peak_memory("sdpa", 16384, "float32", CPU)
    ours = peak_memory("stablemask", 16384, "float32", CPU)
    assert ours < one_score_matrix / 8
    # Output and three gradients are most of it; two rows of numbers a head are all we add.
    assert ours < 1.1 * sdpa
    dense = peak_memory("definition", 2048, "float32", CPU)
    assert dense > 8 * 2048 * 2048 * 4 / 2**20


def test_training_benchmark_runs_every_row():
    rows = measure_training("tiny", batch_size=1, steps=1, dtype="float32", device=CPU)
    assert list(rows) == ["sdpa", "softmax", "stablemask"]
    assert rows["sdpa"]["ratio"] == 1.0
    assert all(row["tokens_per_second"] > 0 for row in rows.values())


def test_the_command_prints_a_table_ends_with_json_and_saves_it(tmp_path, capsys):
    run(
        BenchOptions(
            lengths=[64, 128], dtypes=["float32"], rounds=2, memory=False, training=False,
            save=str(tmp_path),
        )
    )  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    printed = json.loads(lines[-1])
    (saved,) = tmp_path.glob("attention-*.json")
    assert json.loads(saved.read_text()) == printed
    assert [(row["row"], row["length"]) for row in printed["attention"]] == [
        (row, length) for length in (64, 128) for row in attention.ROWS
    ]
    assert {"hardware", "versions", "command", "distance_from_definition"} <= printed.keys()
    assert sum(line.startswith("stablemask ") for line in lines) == 2


@pytest.mark.parametrize("changes", [{"lengths": [0]}, {"rounds": -1}, {"dtypes": ["int8"]}])
def test_bad_options(changes):
    with pytest.raises(InputError):
        run(BenchOptions(**changes))
