"""`python -m benchmarks gpu`, part by part: on toy sizes, through the contract of CUDA's operators in place of a card."""

import json
import math
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_contract, gpu_page, gpu_parts, memory, timing
from benchmarks.timing import Budget
from benchmarks.training import measure
from stablemask.models.presets import PRESETS
from tests import cuda_contract, marks

ROOT = Path(__file__).parents[2]

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip
TOY = gpu_parts.Sizes(
    device="cpu", attention=[(2, 24)], head_dims=[16], width=32, caches=[(2, 40, 4)],
    masked=(1, 32), live=64, graphs=False, cell=Budget(0.0, min_rounds=1),
    batches={"160m": 2, "410m": 2}, train=0.0,
)  # fmt: skip


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(timing, "PRECISION", math.inf)
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 0.0)
    return cuda_contract.emulate(monkeypatch, (9, 0))


def run(part, path, sizes=TOY, seconds=60.0):
    results = gpu.Results(path, part)
    gpu_parts.PARTS[part](results, sizes, seconds)
    return results.of()


def test_the_contract_holds_and_a_kernel_that_is_wrong_is_named(card, tmp_path, monkeypatch):
    path = tmp_path / "gpu.jsonl"
    rows = run("contract", path)
    machine, *checks = rows
    assert machine["capability"] == [9, 0]
    assert {"hardware", "versions", "date"} <= machine.keys()
    assert len(checks) > 120
    assert all(row["ok"] and row["share_of_tolerance"] <= 1 for row in checks)
    operators = {name for name, *_ in card.calls}
    for kernel in ("flash", "flash window", "flash packed", "cudnn", "efficient"):
        assert {f"{kernel} forward", f"{kernel} backward"} <= operators
    # With a resumed run's results nothing is done again.
    assert run("contract", path) == rows

    right = gpu_contract.KERNELS["efficient"]
    wrong = type(right)(right.forward, lambda *a: [d * 1.1 for d in right.backward(*a)])
    monkeypatch.setitem(gpu_contract.KERNELS, "efficient", wrong)
    monkeypatch.setitem(gpu_contract.KERNELS, "cudnn", type(right)(None, None))
    rows = run("contract", tmp_path / "wrong.jsonl")[1:]
    assert {row["case"].partition(",")[0] for row in rows if not row["ok"]} == {
        "efficient",
        "cudnn",
    }
    text = gpu_page.section(gpu.read(tmp_path / "wrong.jsonl"))
    assert f"{sum(row['ok'] for row in rows)} of {len(rows)} checks" in text
    assert "- cudnn, bfloat16" in text


def test_a_card_before_ampere_is_asked_what_it_serves(monkeypatch, tmp_path):
    cuda_contract.emulate(monkeypatch, (7, 5))
    checks = run("contract", tmp_path / "gpu.jsonl")[1:]
    assert {row["case"].split(", ")[0] for row in checks} == {"efficient"}
    assert all(row["ok"] for row in checks)


def test_a_lost_card_ends_the_process_and_the_next_one_goes_on(card, tmp_path, monkeypatch):
    def lost(check, device):
        if check.kernel == "cudnn":
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        return 0.5

    monkeypatch.setattr(gpu_contract, "error_of", lost)
    path = tmp_path / "gpu.jsonl"
    for number in (1, 2):
        with pytest.raises(gpu_parts.LostError):
            run("contract", path)
        refused = [row for row in gpu.read(path) if row.get("ok") is False]
        assert len(refused) == number
    assert refused[0]["reason"].endswith("an illegal memory access was encountered")


def test_attention_and_decoding(card, tmp_path):
    path = tmp_path / "gpu.jsonl"
    rows = run("attention", path)
    names = {"sdpa", "stablemask", "stablemask flash", "stablemask cudnn", "learned sink"}
    assert {(r["row"], r["pass"]) for r in rows} == {
        (name, kind) for name in names for kind in ("forward", "forward+backward")
    }
    assert all(row["ratio"] > 0 and row["tflops"] >= 0 for row in rows)
    assert any("cudnn" in name for name, *_ in card.calls)
    decoded = run("decode", path)
    assert {row["row"] for row in decoded} == {"sdpa", "stablemask", "learned sink"}
    assert {row["case"] for row in decoded} == {"2 x 40, 4 query heads a key head"}
    assert run("attention", path) == rows
    text = gpu_page.section(gpu.read(path))
    assert "| 2 x 40, 4 query heads a key head |" in text
    assert "| stablemask cudnn |" in text


def test_the_speed_is_that_of_half_of_the_scores():
    case = gpu_parts.Case("cpu", "bfloat16", 2, 1024, 1024, 128, heads=8)
    # 2 sequences, 8 heads, 1024 * 1024 / 2 scores, two products of 128 multiplications and additions.
    flops = 2 * 8 * (1024 * 1024 / 2) * 2 * (2 * 128)
    assert gpu_parts._speed(case, "forward", 1.0) == {"tflops": round(flops / 1e9, 1)}
    assert gpu_parts._speed(case, "forward+backward", 1.0) == {
        "tflops": round(3.5 * flops / 1e9, 1)
    }


def test_a_share_of_the_cards_peak(monkeypatch):
    monkeypatch.setattr(gpu_parts, "peak_flops", lambda device, dtype: 1e12)
    case = gpu_parts.Case("cpu", "bfloat16", 1, 1000, 1000, 50, heads=10)
    assert gpu_parts._speed(case, "forward", 2.0) == {"tflops": 0.5, "of_peak": 0.5}


@marks.proc
def test_masks_and_memory_without_a_process_a_row(card, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "counts_live", lambda device: True)
    monkeypatch.setattr(memory, "in_fresh_process", None)
    rows = run("masks", tmp_path / "gpu.jsonl")
    timed = {(r["case"].partition(",")[0], r["row"]) for r in rows if "ms" in r}
    assert timed == {(mask, row) for mask in gpu_parts.MASKS for row in ("sdpa", "stablemask")}
    told = [(row["mask"], row["row"]) for row in rows if "mib" in row]
    assert len(told) == 11
    assert not [row for row in rows if "reason" in row]
    text = gpu_page.section(gpu.read(tmp_path / "gpu.jsonl"))
    assert "Peak memory above the inputs, forward and backward of 64 tokens" in text


@pytest.fixture
def small_presets(monkeypatch):
    for name in ("tiny", "160m", "410m"):
        monkeypatch.setitem(PRESETS, name, SIZES)
    monkeypatch.setattr(measure, "BLOCK_SECONDS", 0.0)
    monkeypatch.setattr(measure, "MIN_ROUNDS", 1)


@marks.proc
@pytest.mark.usefixtures("small_presets")
def test_training_measures_its_memory_as_it_goes(card, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "counts_live", lambda device: True)
    monkeypatch.setattr(measure, "in_fresh_process", None)
    path = tmp_path / "gpu.jsonl"
    rows = run("train-160m", path)
    assert [row["reason"] for row in rows if "reason" in row] == []
    assert [row["row"] for row in rows] == ["stablemask", "softmax", "plain", "llama"]
    assert all(row["tokens_per_second"] > 0 and row["mib"] is not None for row in rows)
    assert all(row["of_softmax"] and row["of_best_other"] for row in rows)
    assert any("flash" in name or "cudnn" in name for name, *_ in card.calls)
    assert "**training 160m, bfloat16, 2 x 16 tokens a step**" in gpu_page.section(gpu.read(path))


def test_the_other_training_parts(monkeypatch, tmp_path):
    asked = []

    def measured(workload, **options):
        asked.append((workload.preset, workload.compile, workload.batch_size))
        return measure.Measured()

    monkeypatch.setattr("benchmarks.training.measure_training", measured)
    for part in ("train-410m", "train-160m-compiled", "train-410m-compiled"):
        run(part, tmp_path / "gpu.jsonl", gpu_parts.Sizes(device="cpu"))
    assert asked == [("410m", False, 16), ("160m", True, 64), ("410m", True, 16)]


def small_pair(folder):
    text = folder / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"{number} and so on, said the fox to the hen. " * 20)
    return {"preset": "160m", "batch_size": 2, "data": str(text), "eval_tokens": 64}


@pytest.mark.usefixtures("small_presets", "card")
def test_the_pair_trains_without_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import of it fails
    monkeypatch.setenv("STABLEMASK_CACHE", str(tmp_path / "cache"))
    sizes = gpu_parts.replace(TOY, pair=small_pair(tmp_path), pair_steps=4)
    path = tmp_path / "gpu.jsonl"
    rows = run("pair-160m", path, sizes)
    assert [row["case"] for row in rows] == ["stablemask", "softmax"]
    assert all(row["steps"] == 4 and row["evaluations"] for row in rows)
    assert all(1 < row["perplexity"] < 400 for row in rows)
    assert run("pair-160m", path, sizes) == rows
    assert "| stablemask | " in gpu_page.section(gpu.read(path))


def test_the_pair_has_as_many_steps_as_there_is_time_for(tmp_path):
    results = gpu.Results(tmp_path / "gpu.jsonl", "train-160m")
    trained = {"row": "stablemask", "batch": 64, "context": 512, "tokens_per_second": 64 * 512 * 10}
    results.write("160m", **trained)
    pair = gpu.Results(tmp_path / "gpu.jsonl", "pair-160m")
    assert gpu_parts._steps_in(200, pair, gpu_parts.GPU) == 700  # 10 a second, 70 seconds each
    assert gpu_parts._steps_in(10, pair, gpu_parts.GPU) == 20


def test_the_tests_of_a_card_are_told_one_by_one(tmp_path):
    file = tmp_path / "test_of_a_card.py"
    file.write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.gpu\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "@pytest.mark.skip\n"
        "def test_skipped(): pass\n"
    )
    flex = tmp_path / "test_flex_of_a_card.py"
    flex.write_text("import nothing_of_that_name\n")
    sizes = gpu_parts.Sizes(device="cpu", tests=[file, flex])
    path = tmp_path / "gpu.jsonl"
    wrong, counts = run("tests", path, sizes)
    assert wrong["case"].endswith("test_wrong")
    assert wrong["failed"] == "assert 1 == 2"
    assert counts["case"] == file.name
    assert counts["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    text = gpu_page.section(gpu.read(path))
    assert "Tests on it: 1 passed, 1 failed, 1 skipped." in text
    assert "test_wrong: assert 1 == 2" in text
    assert run("tests", path, sizes) == [wrong, counts]


def test_tests_that_lose_the_card_end_their_file(tmp_path):
    file = tmp_path / "test_of_a_lost_card.py"
    file.write_text(
        "import pytest\n"
        "@pytest.mark.gpu\n"
        "@pytest.mark.parametrize('number', range(3))\n"
        "def test_wrong(number): raise RuntimeError('CUDA error: an illegal memory access')\n"
    )
    path = tmp_path / "gpu.jsonl"
    sizes = gpu_parts.Sizes(device="cpu", tests=[file])
    with pytest.raises(gpu_parts.LostError):
        run("tests", path, sizes)
    failed, counts = gpu.read(path)
    assert "illegal memory access" in failed["failed"]
    assert counts["counts"] == {"failed": 1}
    run("tests", path, sizes)  # the next process has other files to go on with


def test_the_files_with_a_test_for_a_card_are_found():
    files = [str(path.relative_to(ROOT)) for path in gpu_parts.gpu_tests()]
    assert files[0] == "tests/backends/test_cuda.py"
    assert "tests/backends/test_flex.py" in files
    assert "tests/benchmarks/test_rows.py" not in files


def test_flex(card, tmp_path):
    path = tmp_path / "gpu.jsonl"
    rows = run("flex", path, gpu_parts.replace(TOY, tests=[Path("test_nothing_of_it.py")]))
    assert {row["row"] for row in rows} == {"sdpa", "stablemask flex"}


@pytest.fixture
def limits(monkeypatch):
    monkeypatch.setattr(gpu, "LEAST", 0.1)
    monkeypatch.setattr(gpu, "SAVING", 0.0)
    limits = {"quick": 20, "endless": 1, "crash": 20, "late": 20}
    monkeypatch.setattr(gpu, "LIMITS", limits)
    return list(limits)


def script(folder, name):
    line = f"open({str(folder / name)!r}, 'a').write('x')"
    does = {"endless": "import time; time.sleep(60)", "crash": "import os; os.abort()"}
    return [sys.executable, "-S", "-c", f"{line}; {does.get(name, '')}"]


def test_a_part_that_hangs_or_dies_leaves_the_others(limits, tmp_path):
    path = tmp_path / "gpu.jsonl"

    def go():
        gpu.run_parts(limits, path, 60.0, lambda name, left: script(tmp_path, name))
        return {row["case"]: row["exit"] for row in gpu.read(path)}

    assert go() == {"quick": 0, "endless": gpu.CUT_OFF, "crash": -6, "late": 0}
    go()
    runs = {name: len((tmp_path / name).read_text()) for name in limits}
    assert runs == {"quick": 1, "endless": 2, "crash": 2, "late": 1}


def test_nothing_begins_after_the_budget(limits, tmp_path):
    path = tmp_path / "gpu.jsonl"
    begun = time.monotonic()
    gpu.run_parts(["endless", "late"], path, 0.5, lambda name, left: script(tmp_path, name))
    assert time.monotonic() - begun < 5
    exits = {row["case"]: row["exit"] for row in gpu.read(path)}
    assert exits == {"endless": gpu.CUT_OFF, "late": gpu.NO_TIME}
    assert not (tmp_path / "late").exists()


def test_a_part_goes_on_in_a_new_process_when_the_card_is_lost(limits, tmp_path):
    seen = []

    def command(name, left):
        seen.append(name)
        code = gpu.LOST if len(seen) < 3 else 0
        return [sys.executable, "-S", "-c", f"import sys; sys.exit({code})"]

    gpu.run_parts(["quick"], tmp_path / "gpu.jsonl", 60.0, command)
    assert seen == ["quick"] * 3
    assert gpu.read(tmp_path / "gpu.jsonl")[0]["exit"] == 0


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    path = tmp_path / "gpu.jsonl"
    results = gpu.Results(path, "contract")
    results.write("first", share=math.nan)
    path.write_text(path.read_text() + '{"part": "contr')
    assert gpu.read(path) == [{"part": "contract", "case": "first", "share": None}]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["speed"], "no part speed; the parts are contract, tests"),
        (["--out", __file__], "exists; go on with --resume"),
        ([], "sees no CUDA device"),
    ],
)
def test_what_cannot_run_is_said_in_a_line(monkeypatch, capsys, tmp_path, arguments, words):
    monkeypatch.setattr(gpu, "_has_gpu", lambda: False)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "none.jsonl")
    with pytest.raises(SystemExit) as ended:
        gpu.main(arguments)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def in_a_process(part, path):
    """A part through the emulation, as ``gpu.py`` starts it; pytest has no hand in this process."""
    with cuda_contract.emulated((9, 0)), pytest.MonkeyPatch.context() as patch:
        for module in (timing, measure):
            patch.setattr(module, "BLOCK_SECONDS", 0.0)
        patch.setattr(timing, "PRECISION", math.inf)
        for module in (memory, measure):
            patch.setattr(module, "counts_live", lambda device: True)
        for name in ("tiny", "160m", "410m"):
            patch.setitem(PRESETS, name, SIZES)
        pair = {"preset": "160m", "batch_size": 2, "eval_tokens": 64}
        pair["data"] = str(Path(path).parent / "text")
        tests = [ROOT / "tests/backends/test_choice.py", ROOT / "tests/backends/test_flex.py"]
        run(part, Path(path), gpu_parts.replace(TOY, pair=pair, pair_steps=4, tests=tests))


@marks.nightly
@marks.proc
def test_from_end_to_end(tmp_path):
    small_pair(tmp_path)
    path = tmp_path / "gpu.jsonl"
    call = "import sys; from tests.benchmarks.test_gpu import in_a_process as p; p(*sys.argv[1:])"
    parts = [part for part in gpu.LIMITS if "compiled" not in part]
    gpu.run_parts(parts, path, 1200, lambda part, s: [sys.executable, "-c", call, part, str(path)])
    rows = gpu.read(path)
    assert {row["case"]: row["exit"] for row in rows if row["part"] == "parts"} == dict.fromkeys(
        parts, 0
    )
    assert {row["part"] for row in rows} == {"parts", *parts}
    refused = {(row["row"], row["incorrect"]) for row in rows if "reason" in row}
    assert refused == {("stablemask flex", False)}  # which has no compiler, emulated
    text = gpu_page.section(rows)
    for words in ("**Forward:", "**Decoding", "**Under a mask", "**Peak memory", "**training 410m"):
        assert words in text
    assert len(list(tmp_path.iterdir())) == 2  # the text and the results


def test_every_part_has_a_limit_of_six_minutes_at_most():
    assert list(gpu.LIMITS) == list(gpu_parts.PARTS)
    assert max(gpu.LIMITS.values()) <= 360


def test_the_section_of_the_page_is_what_the_command_writes(tmp_path, monkeypatch):
    page = tmp_path / "benchmarks.md"
    page.write_text(gpu_page.PAGE.read_text())
    monkeypatch.setattr(gpu_page, "PAGE", page)
    gpu_page.main([])
    assert page.read_text() == (ROOT / "docs" / "benchmarks.md").read_text()
    measured = tmp_path / "gpu.jsonl"
    lines = [
        {"part": "contract", "case": "machine", "hardware": "a card", "capability": [9, 0],
         "versions": {"torch": "2.11"}, "date": "2026-11-28", "command": "x"},
        {"part": "attention", "case": "1 x 64", "row": "stablemask", "pass": "forward", "ms": 1.0,
         "ratio": 1.01, "tflops": 400.2, "of_peak": 0.404},
    ]  # fmt: skip
    measured.write_text("".join(json.dumps(line) + "\n" for line in lines))
    gpu_page.main([str(measured)])
    text = page.read_text()
    assert "a card (compute capability 9.0), torch 2.11, 2026-11-28, by `x`" in text
    assert "| stablemask | 1.01, 400 (40%) |" in text
    assert "Not measured yet" not in text
    with pytest.raises(SystemExit):
        gpu_page.main([str(tmp_path / "none.jsonl")])
