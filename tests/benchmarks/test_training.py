"""Whole training loops: all train the same model, in the same precision, and a wrong one is found out."""

import json
import math
import sys

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks import timing
from benchmarks.commands import TrainingOptions, time_training
from benchmarks.correctness import IncorrectError
from benchmarks.training import ROWS, Workload, measure, measure_training, rows
from benchmarks.training.check import Reference
from benchmarks.training.plain import PlainDecoder, PlainLoop
from stablemask.errors import InputError, RunError
from stablemask.models.presets import PRESETS
from tests import marks

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16,
}  # fmt: skip
FAST = ["stablemask", "softmax", "llama", "plain"]


@pytest.fixture(autouse=True)
def _small_presets(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", {**SIZES, "tie_word_embeddings": True})
    monkeypatch.setitem(PRESETS, "71m", SIZES)
    monkeypatch.setattr(measure, "BLOCK_SECONDS", 0.0)
    monkeypatch.setattr(measure, "MIN_ROUNDS", 1)
    monkeypatch.setattr(timing, "PRECISION", math.inf)


def build(name, folder, preset="71m", dtype="float32", batch_size=4):
    if name == "litgpt":
        pytest.importorskip("litgpt", reason=f"needs litgpt: {rows.INSTALL_LITGPT}")
    load = Workload(preset, dtype, batch_size, "cpu")
    return load, ROWS[name].build(load, folder / name)


@pytest.mark.parametrize(("preset", "dtype"), [("71m", "float32"), ("tiny", "bfloat16")])
@pytest.mark.parametrize("name", ROWS)
def test_loss_and_gradients_are_those_of_the_model_in_float64(tmp_path, name, preset, dtype):
    load, contender = build(name, tmp_path, preset, dtype)
    reference = Reference(load, ROWS[name].attention)
    assert {
        "loss",
        "lm_head.weight",
        "model.layers.1.self_attn.k_proj.weight",
    } <= reference.exact.keys()
    assert reference.check(contender) < 1
    assert all(parameter.grad is None for parameter in contender.parameters().values())


def test_a_row_must_be_of_its_own_attention(tmp_path):
    load, contender = build("softmax", tmp_path)
    with pytest.raises(IncorrectError, match=r"loss is .* from the reference, above"):
        Reference(load, "stablemask").check(contender)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ROWS)
def test_every_loop_takes_the_steps_it_is_asked_for_alike(tmp_path, name, dtype):
    load, contender = build(name, tmp_path, dtype=dtype)
    linear = next(m for m in contender._model.modules() if isinstance(m, nn.Linear))
    ids = load.blocks().ids
    with torch.no_grad():  # so that there is something to clip
        contender.parameters()["lm_head.weight"].mul_(10)
    contender.loss(ids).backward()
    gradients = [p.grad for p in set(contender.parameters().values())]
    assert nn.utils.get_total_norm(gradients) > 1.5
    for parameter in contender.parameters().values():
        parameter.grad = None

    steps, dtypes = [], []

    def seen(optimizer, *_):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        settings = [(group["lr"], group["betas"]) for group in optimizer.param_groups]
        decays = {
            p.dim(): group["weight_decay"]
            for group in optimizer.param_groups
            for p in group["params"]
        }
        norm = nn.utils.get_total_norm(gradients).item()
        steps.append((type(optimizer), norm, settings, decays[2]))

    handles = [
        register_optimizer_step_pre_hook(seen),
        linear.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype)),
    ]
    before = contender.loss(ids).item()
    seconds = [contender.run(3), contender.run(2)]
    after = contender.loss(ids).item()
    for handle in handles:
        handle.remove()

    assert after < before
    assert all(0 < value < 60 for value in seconds)
    assert len(steps) == 5
    for kind, norm, settings, decay in steps:
        assert kind is torch.optim.AdamW
        assert norm == pytest.approx(1, rel=1e-4)
        assert decay == 0.1
        assert all(betas == (0.9, 0.98) for _, betas in settings)
    for first in (0, 3):  # the rate falls from the start of each segment
        assert steps[first][2][0][0] == pytest.approx(1e-3)
        assert steps[first + 1][2][0][0] < 1e-3
    assert set(dtypes) == {getattr(torch, dtype)}


def test_a_wrong_row_and_one_that_cannot_be_built_are_reported_and_not_timed(monkeypatch):
    class Wrong(PlainDecoder):
        def forward(self, ids, targets):
            return super().forward(ids, targets) * 1.001

    def missing(workload, folder):
        raise ModuleNotFoundError("No module named 'nothing'")

    monkeypatch.setattr("benchmarks.training.plain.PlainDecoder", Wrong)
    monkeypatch.setitem(ROWS, "llama", rows.Row("llama", missing))
    load = Workload("tiny", "float32", 2, "cpu")
    measured = measure_training(load, names=["softmax", "llama", "plain"], seconds=0, memory=False)
    assert [row["row"] for row in measured.rows] == ["softmax"]
    assert measured.rows[0]["of_best_other"] is None
    llama, plain = measured.not_timed
    assert llama["reason"] == "ModuleNotFoundError: No module named 'nothing'"
    assert (llama["incorrect"], plain["incorrect"]) == (False, True)
    assert "loss is " in plain["reason"]


def test_a_loop_that_does_not_learn_is_found_out(monkeypatch):
    monkeypatch.setattr(PlainLoop, "run", lambda self, steps: 1.0)
    load = Workload("tiny", "float32", 2, "cpu")
    measured = measure_training(load, names=["plain"], seconds=0, memory=False)
    assert "the loss of the batch goes from" in measured.not_timed[0]["reason"]


def test_without_litgpt_its_row_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.delitem(sys.modules, "benchmarks.training.lit", raising=False)
    load = Workload("tiny", "float32", 2, "cpu")
    measured = measure_training(load, names=["litgpt"], seconds=0, memory=False)
    assert measured.rows == []
    assert measured.not_timed[0]["reason"] == f"needs lightning: {rows.INSTALL_LITGPT}"


def test_the_command(tmp_path, capsys):
    options = TrainingOptions(
        quick=True, presets=["tiny"], dtypes=["bfloat16"], rows=FAST, memory=False,
        save=str(tmp_path),
    )  # fmt: skip
    time_training(options)
    lines = capsys.readouterr().out.splitlines()
    printed = json.loads(lines[-1])
    (saved,) = tmp_path.glob("training-cpu-*.json")
    assert json.loads(saved.read_text()) == printed
    assert {"hardware", "versions", "command", "date"} <= printed.keys()
    assert 0 < printed["share_of_tolerance"] < 1
    by_name = {record["row"]: record for record in printed["training"]}
    assert list(by_name) == FAST
    assert by_name["softmax"]["of_softmax"] == 1
    assert 1 in (by_name[name]["of_best_other"] for name in ("llama", "plain"))
    assert all(record["tokens_per_second"] > 0 for record in printed["training"])
    assert "| row | tokens/s | of our softmax | of the best other |" in lines
    assert sum(line.startswith(tuple(f"| {name} |" for name in FAST)) for line in lines) == 4


def test_a_command_that_is_cut_off_leaves_what_came_before(tmp_path, monkeypatch):
    measured = []

    def until_the_second(workload, **options):
        if measured:
            raise KeyboardInterrupt
        measured.append(workload.preset)
        return measure.Measured(rows=[{"row": "softmax"}])

    monkeypatch.setattr("benchmarks.training.measure_training", until_the_second)
    with pytest.raises(KeyboardInterrupt):
        time_training(TrainingOptions(dtypes=["bfloat16"], save=str(tmp_path)))
    (saved,) = tmp_path.glob("training-cpu-*.json")
    assert json.loads(saved.read_text())["training"] == [{"row": "softmax"}]
    assert measured == ["tiny"]


def test_a_wrong_row_ends_the_command_with_an_error(monkeypatch, capsys):
    monkeypatch.setattr(PlainLoop, "run", lambda self, steps: 1.0)
    options = TrainingOptions(quick=True, presets=["tiny"], rows=["plain"], memory=False)
    with pytest.raises(RunError, match=r"not what they claim to compute.*plain"):
        time_training(options)
    assert "INCORRECT: the loss of the batch goes from" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{"presets": ["huge"]}, {"presets": []}, {"rows": ["sdpa"]}])
def test_bad_options(changes):
    with pytest.raises(InputError, match="must be of"):
        time_training(TrainingOptions(**changes))


@marks.nightly
@marks.proc
def test_peak_memory_holds_weights_gradients_moments_and_logits():
    # In a process of its own the presets are what they are.
    load = Workload("tiny", "float32", 4, "cpu")
    found = measure.in_fresh_process(measure.peak_mib, load, ["plain"])
    parameters, logits = 2.97e6, 4 * 256 * 4096
    least = 4 * (4 * parameters + 2 * logits) / 2**20
    assert least < found["plain"] < 3 * least
