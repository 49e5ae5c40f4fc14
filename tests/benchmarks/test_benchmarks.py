"""The benchmark runs and says what it means; how fast a machine is belongs to no test."""

import json
import math

import pytest

from benchmarks import commands, masks, memory, plan, rows, timing
from benchmarks.__main__ import NAMES, main
from benchmarks.cases import Case
from benchmarks.commands import AttentionOptions, TrainingOptions, time_attention
from benchmarks.figure import save_figure
from benchmarks.measure import measure
from benchmarks.memory import peak_memory
from benchmarks.rows import all_rows
from benchmarks.timing import Budget
from stablemask.errors import InputError, RunError
from tests import marks

CHEAP = ["sdpa", "stablemask", "definition"]


@pytest.fixture(autouse=True)
def no_more_rounds_than_it_takes(monkeypatch):
    monkeypatch.setattr(timing, "PRECISION", math.inf)
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 0.0)


@marks.proc
def test_memory_is_linear_in_length():
    one_score_matrix = 8 * 4096 * 4096 * 4 / 2**20
    long = Case("cpu", "float32", 1, 4096, 4096)
    ours = peak_memory("stablemask", long)
    assert ours < one_score_matrix / 8
    # Output and three gradients are most of it; two rows of numbers a head are all we add.
    assert ours < 1.1 * peak_memory("sdpa", long)


def options(**changes):
    small = {
        "lengths": [32, 64], "dtypes": ["float32"], "head_dims": [16], "groups": [1],
        "rows": CHEAP, "memory": False, "masks": False,
    }  # fmt: skip
    return AttentionOptions(**small | changes)


def test_the_command_prints_tables_ends_with_json_and_saves_it_with_a_figure(tmp_path, capsys):
    time_attention(options(save=str(tmp_path), groups=[1, 4], masks=True))
    lines = capsys.readouterr().out.splitlines()
    printed = json.loads(lines[-1])
    (saved,) = tmp_path.glob("attention-*.json")
    assert json.loads(saved.read_text()) == printed
    assert saved.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert {"hardware", "versions", "command", "date", "share_of_tolerance"} <= printed.keys()
    assert {"torch", "python", "stablemask"} <= printed["versions"].keys()

    forward = [r for r in printed["attention"] if r["pass"] == "forward"]
    both = [r for r in printed["attention"] if r["pass"] == "forward+backward"]
    assert len(forward) == len(both) == 2 * 2 * len(CHEAP)
    assert {r["kv_len"] for r in printed["decode"]} == {32, 64}
    assert {r["q_len"] for r in printed["decode"]} == {1}
    assert {r["mask"] for r in printed["masks"]} == {"alibi", "window", "documents"}
    assert all(r["ratio"] == 1.0 for r in forward if r["row"] == "sdpa")
    assert all(r["ms"] > 0 and r["quartiles"][0] <= r["ratio"] for r in printed["decode"])
    assert sum(line.startswith("| stablemask |") for line in lines) >= 8


def test_a_row_that_is_wrong_is_reported_and_not_timed(capsys, monkeypatch):
    right = rows.stable_mask_attention
    monkeypatch.setattr(rows, "stable_mask_attention", lambda *t, **k: right(*t, **k) * 1.001)
    with pytest.raises(RunError, match="stablemask"):
        time_attention(options(decode=False))
    output = capsys.readouterr().out
    printed = json.loads(output.splitlines()[-1])
    assert {record["row"] for record in printed["attention"]} == {"sdpa", "definition"}
    wrong = [record for record in printed["not_timed"] if record["incorrect"]]
    assert {record["row"] for record in wrong} == {"stablemask"}
    assert "INCORRECT: output is" in output


def test_dense_rows_are_left_out_at_great_lengths(capsys):
    time_attention(options(lengths=[2049], groups=[1], decode=False))
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {record["row"] for record in printed["attention"]} == {"sdpa", "stablemask"}
    reasons = {record["row"]: record["reason"] for record in printed["not_timed"]}
    assert "2048" in reasons["definition"]


def test_the_default_plan_covers_the_lengths_the_shapes_and_both_batches():
    scope = plan.Scope("cpu", False, ["float32", "bfloat16"], None, [64, 128], [1, 4])
    every = list(all_rows("cpu").values())
    cells = list(plan.length_cells(scope, every))
    first = [cell.case for cell in cells if (cell.case.head_dim, cell.case.groups) == (64, 1)]
    assert [case.q_len for case in first] == [512, 1024, 2048, 4096, 8192, 16384] * 2
    others = {(c.case.head_dim, c.case.groups, c.case.q_len) for c in cells} - {
        (64, 1, case.q_len) for case in first
    }
    assert others == {(128, 1, 1024), (128, 1, 4096), (64, 4, 1024), (64, 4, 4096)}
    decode = [cell.case for cell in plan.decode_cells(scope, every)]
    assert {(case.batch, case.kv_len) for case in decode} >= {
        (batch, length) for batch in (1, 8) for length in (1024, 4096, 16384)
    }
    for cell in cells:
        assert {"sdpa", "stablemask"} <= {row.name for row in cell.rows}


def test_a_figure_of_decode_alone(tmp_path):
    record = {"row": "stablemask", "pass": "decode", "dtype": "float32", "head_dim": 64}
    record |= {"groups": 1, "batch": 1}
    decode = [record | {"kv_len": n, "ratio": 1.1} for n in (1024, 4096)]
    result = {"decode": decode, "hardware": "a CPU", "versions": {"torch": "2"}}
    save_figure(result, tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text()
    assert "<svg" in text


def test_a_run_that_is_cut_off_leaves_the_sections_before(tmp_path, monkeypatch):
    def stopped(scope, rows):
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "decode_cells", stopped)
    with pytest.raises(KeyboardInterrupt):
        time_attention(options(save=str(tmp_path), lengths=[32]))
    (saved,) = tmp_path.glob("attention-*.json")
    assert {r["row"] for r in json.loads(saved.read_text())["attention"]} == set(CHEAP)


def test_nothing_begins_after_the_budget(capsys):
    time_attention(options(budget=1e-9, masks=True))
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["not_begun"] == {"attention": 2, "decode": 4, "masks": 6}
    assert printed["attention"] == []


def test_a_gpu_has_defaults_that_end_in_time(monkeypatch):
    monkeypatch.setattr(commands, "_device", lambda: "cuda")
    chosen = commands._with_defaults(TrainingOptions())
    assert (chosen.presets, chosen.dtypes, chosen.budget) == (["160m", "410m"], ["bfloat16"], 500)
    given = AttentionOptions(budget=60, dtypes=["float16"])
    assert commands._with_defaults(given).budget == 60
    monkeypatch.setattr(commands, "_device", lambda: "cpu")
    assert commands._with_defaults(AttentionOptions()).budget == math.inf


def test_the_memory_of_a_gpu_is_measured_in_this_process(monkeypatch):
    monkeypatch.setattr(memory, "_measure", lambda row, case: 1.5)
    monkeypatch.setattr(memory, "in_fresh_process", None)
    assert peak_memory("sdpa", Case("cuda", "bfloat16", 1, 64, 64)) == 1.5


@pytest.mark.parametrize("mask", masks.MASKS)
def test_a_mask_is_the_same_dense(mask):
    case = Case("cpu", "float32", 2, 320, 320, head_dim=16, mask=mask)
    cell = measure(case, [r for r in rows.own_rows("cpu") if r.name in CHEAP], Budget(0, 1))
    assert {t["row"] for t in cell.rows} >= {"sdpa", "stablemask"}
    assert not [skipped for skipped in cell.not_timed if skipped["incorrect"]]
    seen = masks.dense_bias(case)[0].isfinite().sum()
    assert (seen < 320 * 321 / 2) == (mask not in ("causal", "alibi"))


@pytest.mark.parametrize(
    "changes",
    [
        {"lengths": [0]}, {"lengths": [1]}, {"dtypes": ["int8"]}, {"groups": [3]},
        {"head_dims": [0]}, {"rows": ["fastest"]}, {"budget": 0.0},
    ],
)  # fmt: skip
def test_bad_options(changes):
    with pytest.raises(InputError):
        time_attention(AttentionOptions(**changes))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--help"], 0, "  attention   by length"),
        (["speed"], 2, "no benchmark 'speed'; they are attention, training, generation"),
        (["attention", "--lengths", "0"], 2, "lengths must be at least 1 each, got [0]"),
        (["training", "--presets", "huge"], 2, "presets must be of"),
        (["generation"], 2, "--model must be given"),
        (["generation", "--loud"], 2, "python -m benchmarks generation --help"),
        (["streaming", "--models", "none", "--out", "none"], 2, "none"),
    ],
)
def test_the_command_line(capsys, words, code, said):
    assert main(words) == code
    printed = capsys.readouterr()
    assert said in (printed.err if code else printed.out)
    assert printed.err.count("\n") == bool(code)


def test_every_benchmark_has_options_of_its_own(capsys):
    for name in NAMES:
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        assert f"python -m benchmarks {name}" in capsys.readouterr().out
