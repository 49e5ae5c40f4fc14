"""Pretraining as a user runs it: small, but the whole of it."""

import json
import math
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import stablemask.hf
from stablemask.errors import InputError, RunError
from stablemask.options import load_yaml, save_yaml
from stablemask.reading import read_json
from stablemask.training import checkpoints
from stablemask.training.callbacks import SkipBadSteps
from stablemask.training.dry_run import describe_cost
from stablemask.training.finetune import finetune
from stablemask.training.finetune_options import FinetuneOptions
from stablemask.training.pretrain import pretrain
from stablemask.training.pretrain_options import PretrainOptions
from stablemask.training.run import RunResult, begin_run, command_line, put_in_place
from stablemask.writing import only_writer

from .conftest import STEPS, WORDS, metrics


def test_a_run_leaves_everything_a_user_needs(uninterrupted, options):
    model = AutoModelForCausalLM.from_pretrained(uninterrupted)
    tokenizer = AutoTokenizer.from_pretrained(uninterrupted)
    assert model.config.stablemask == {"gamma": 1 / 32, "horizon": None, "hold": 31}
    assert model.config.eos_token_id == tokenizer.eos_token_id
    written = load_yaml(uninterrupted / "pretrain.yaml")
    assert written["warmup"] == STEPS // 10
    assert written["data"] == options.data
    record = json.loads((uninterrupted / "run.json").read_text())
    assert record["result"]["step"] == STEPS
    card = (uninterrupted / "README.md").read_text()
    assert record["command"] in card
    assert list((uninterrupted / "tensorboard").glob("events*"))
    assert not (uninterrupted / "checkpoints" / "incomplete").exists()
    assert [p.name for p in checkpoints.list_checkpoints(uninterrupted / "checkpoints")] == [
        "checkpoint-32", "checkpoint-36", "checkpoint-40",
    ]  # fmt: skip


def test_the_loss_falls_and_the_metrics_say_so(uninterrupted):
    rows = metrics(uninterrupted)
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == list(range(5, STEPS + 1, 5))
    assert training[-1]["loss"] < training[0]["loss"] - 0.5
    assert training[-1]["tokens"] == STEPS * 2 * 32
    assert all(row["tokens_per_second"] > 0 for row in training)
    assert [row["step"] for row in rows if "eval_loss" in row] == [20, 40]


@pytest.fixture
def poisoned(monkeypatch):
    """The loss of the tenth step is not a number."""
    from stablemask.models.modeling import StableMaskForCausalLM

    forward, calls = StableMaskForCausalLM.forward, []

    def poison(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        calls.append(1)
        if len(calls) == 10:
            output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(StableMaskForCausalLM, "forward", poison)


def test_a_step_that_is_not_finite_is_skipped_and_told_between_the_logs(
    poisoned, options, tmp_path, capsys
):
    result = pretrain(replace(options, out=str(tmp_path / "run"), eval_every=1000, steps=20))
    assert math.isfinite(result.eval_loss)
    told = capsys.readouterr().err  # without a terminal, a line a log
    assert "step 10 is skipped" in told
    lines = [line for line in told.splitlines() if "tokens/s" in line]
    assert [line.partition(":")[0] for line in lines] == [f"step {n}/20" for n in (5, 10, 15, 20)]
    assert all("loss" in line and "left" in line for line in lines)
    assert [row["step"] for row in metrics(tmp_path / "run") if "skipped_because" in row] == [10]
    assert [r["skipped"] for r in metrics(tmp_path / "run") if "loss" in r] == [0, 1, 1, 1]
    for path in (tmp_path / "run" / "checkpoints").glob("*/*.json"):
        json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_too_many_of_them_stop_the_run_before_the_weights(poisoned, options, tmp_path, monkeypatch):
    monkeypatch.setitem(SkipBadSteps.__init__.__kwdefaults__, "limit", 1)
    options = replace(options, out=str(tmp_path / "run"), eval_every=1000)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".pretrain.yaml.7.partial").write_text("preset: ti")  # of a killed start
    with pytest.raises(RunError, match="not finite at step 10"):
        pretrain(options)
    last = checkpoints.list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert last.name == "checkpoint-8"
    checkpoints.verify(last)
    assert all(t.isfinite().all() for t in load_file(last / "model.safetensors").values())


def test_a_result_that_is_not_finite_is_written_as_json_and_read_again(
    uninterrupted, options, tmp_path
):
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    (folder / "partial").mkdir()
    put_in_place(folder / "partial", RunResult(folder, STEPS, math.nan), lambda record: None, {})
    written = (folder / "run.json").read_text()
    result = json.loads(written, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert result["result"] == {"step": STEPS, "eval_loss": None}
    for text in (written, written.replace("null", "NaN")):  # as it was written once
        (folder / "run.json").write_text(text)
        found = pretrain(replace(options, out=str(folder), resume=True))
        assert math.isnan(found.eval_loss)
        assert math.isnan(found.perplexity)
    (folder / "run.json").write_text(
        written.replace(f'"step": {STEPS}', '"step": "all"')
    )  # no result
    assert pretrain(replace(options, out=str(folder), resume=True)).step == STEPS


def test_a_folder_beside_a_model_is_that_of_the_model(tmp_path):
    """A tokenizer with several chat templates has one, and a run may finish twice."""
    (tmp_path / "run.json").write_text("{}")
    for said in ("once", "twice"):
        templates = tmp_path / "partial" / "additional_chat_templates"
        templates.mkdir(parents=True)
        (templates / f"{said}.jinja").write_text(said)
        result = RunResult(tmp_path, STEPS, 1.0)
        put_in_place(tmp_path / "partial", result, lambda record: None, {})
    assert [p.name for p in (tmp_path / templates.name).iterdir()] == ["twice.jinja"]


def test_the_run_folder_is_guarded(uninterrupted, options, tmp_path):
    with pytest.raises(InputError, match="already holds a run"):
        pretrain(replace(options, out=str(uninterrupted)))
    with pytest.raises(InputError, match="no run to resume"):
        pretrain(replace(options, out=str(tmp_path / "nothing"), resume=True))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("do not touch")
    with pytest.raises(InputError, match="not empty"):
        pretrain(replace(options, out=str(tmp_path / "full")))
    with pytest.raises(InputError, match="it is no folder"):
        pretrain(replace(options, out=str(tmp_path / "full" / "thesis.tex")))


def test_one_run_at_a_time_in_a_folder(uninterrupted, options, tmp_path):
    busy = "another process is writing to"
    with only_writer(tmp_path / "new"):
        with pytest.raises(InputError, match=busy):
            pretrain(replace(options, out=str(tmp_path / "new")))
        with pytest.raises(InputError, match=busy):
            finetune(FinetuneOptions(model="m", data="d", steps=1, out=str(tmp_path / "new")))
    with only_writer(uninterrupted), pytest.raises(InputError, match=busy):
        pretrain(replace(options, out=str(uninterrupted), resume=True))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": -3}, "steps"),
        ({"preset": "huge"}, "preset"),
        ({"gamma": 0.0}, "gamma"),
        ({"gamma": -1.0}, "gamma"),
        ({"gamma": "fast"}, "gamma"),
        ({"horizon": 0}, "horizon"),
        ({"hold": "soon"}, "hold"),
        ({"attention": "softmax", "gamma": 0.1}, "gamma"),
        ({"attention": "softmax", "hold": "never"}, "hold"),
        ({"batch_size": 0}, "batch_size"),
        ({"context": 1}, "context"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": math.inf}, "learning_rate"),
        ({"peak_flops": math.inf}, "peak_flops"),
        ({"beta2": 1.5}, "beta2"),
        ({"beta2": 1.0}, "beta2"),
        ({"seed": 2**32}, "seed"),
        ({"skip_spikes": math.nan}, "skip_spikes"),
        ({"skip_spikes": math.inf}, "skip_spikes"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"wandb": True}, "wandb"),
        ({"shuffle_buffer": 50}, "shuffle_buffer goes with --streaming"),
        ({"devices": 2}, "devices goes with --dry-run"),
        ({"data": "/no/such/file.txt"}, "no/such/file"),
        ({"context": 100_000}, "block"),
        ({"tokenizer": "/no/such/tokenizer"}, "tokenizer"),
    ],
)
def test_bad_options_write_nothing(changes, names, options, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    with pytest.raises(InputError, match=names):
        pretrain(replace(options, out=str(tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": "5"}, "steps: '5' is not a whole number or none"),
        ({"steps": 5.0}, "steps: 5.0 is not a whole number"),
        ({"resume": "yes"}, "resume: 'yes' is not true or false"),
        ({"layers": 3.5}, "layers: 3.5 is not a list"),
        ({"clip": None}, "clip: None is not a number"),
        ({"dtype": "float16"}, "dtype: 'float16' is not one of auto, float32, bfloat16"),
    ],
)
def test_values_of_another_type_are_named(changes, words):
    with pytest.raises(InputError, match=re.escape(words)):
        PretrainOptions(**{"out": "x", "steps": 1, **changes}).resolved()


def test_values_that_mean_the_same_are_taken(tmp_path):
    options = PretrainOptions(
        steps=np.int64(5), out=tmp_path, learning_rate=np.float32(0.5), layers=(0, 1), gamma=1
    )
    save_yaml(options, tmp_path / "pretrain.yaml")
    read = load_yaml(tmp_path / "pretrain.yaml")
    names = ("steps", "out", "learning_rate", "layers", "gamma")
    assert [read[n] for n in names] == [5, str(tmp_path), 0.5, [0, 1], 1.0]
    assert PretrainOptions(out="~/run").out == str(Path.home() / "run")


def test_the_command_line_gives_the_same_options(options):
    import shlex

    from stablemask.cli.parser import parse_options

    options = replace(
        options, out="runs/a b", tensorboard=False, gamma="slopes", hold="never", data="builtin",
        mixture=["some text.txt=0.5", "builtin=1"],
    )  # fmt: skip
    words = shlex.split(command_line(options))[2:]
    parsed = parse_options(PretrainOptions, words, prog="p", description="")
    assert parsed == options
    settings = {"gamma": "slopes", "horizon": None, "hold": None}
    assert parsed.resolved().model_config().stablemask == settings


def test_a_tokenizer_that_numbers_its_tokens_with_gaps(prose, options, tmp_path):
    numbers = {word: 9 * number for number, word in enumerate(["<end>", ".", *WORDS])}
    model = Tokenizer(WordLevel(numbers, unk_token="<end>"))
    model.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>").save_pretrained(tmp_path)
    changes = {"vocab_size": 32, "tokenizer": str(tmp_path), "steps": 1, "probe_tokens": 0}
    result = pretrain(replace(options, out=str(tmp_path / "run"), **changes))
    weights = load_file(result.folder / "model.safetensors")
    assert weights["model.embed_tokens.weight"].shape[0] == 128  # the 64th multiple above id 117


def test_what_a_run_was_trained_on_and_with(options, tmp_path, monkeypatch):
    """The record names packages wherever they stand, and its options begin another run as they are."""
    monkeypatch.setattr("stablemask.training.run.packages_of", lambda source: {source: "1"})
    mixed = replace(options, out=str(tmp_path), data="builtin", resume=True)
    mixed = replace(mixed, mixture=["builtin:packages=1", "some.txt=2"]).resolved()
    begin_run(tmp_path, mixed, "key", {})
    assert read_json(tmp_path / "run.json")["packages"] == {"builtin:packages": "1"}
    assert load_yaml(tmp_path / "pretrain.yaml")["resume"] is False
    with pytest.raises(InputError, match=r"builtin:packages, some\.txt: that is not what .* began"):
        begin_run(tmp_path, mixed, "another", {})
    own = FinetuneOptions(model="m", adapt=True, texts=2, steps=1, out=str(tmp_path / "own"))
    begin_run(tmp_path / "own", own, "key", {})
    with pytest.raises(InputError, match="the model's own text: that is not what"):
        begin_run(tmp_path / "own", own, "another", {})


KINDS = ["softmax", "softmax1", "learned-sink", "key-sink", "fixed-token", "stablemask-paper"]


@pytest.mark.parametrize("attention", KINDS)
def test_other_kinds_of_attention_train(attention, options, tmp_path):
    result = pretrain(
        replace(
            options, out=str(tmp_path / "run"), attention=attention, position="alibi", steps=4,
            global_batch_size=2 * options.batch_size, gradient_checkpointing=True, dtype="bfloat16",
        )
    )  # fmt: skip
    assert result.step == 4
    assert result.perplexity < 400
    config = stablemask.hf.load_model(str(result.folder)).config
    is_paper = attention == "stablemask-paper"
    assert config.attention == ("stablemask" if is_paper else attention)
    assert bool(config.stablemask) == is_paper
    assert ("is our reading of it" in (result.folder / "README.md").read_text()) == is_paper


def test_a_dry_run_needs_neither_steps_nor_a_folder_and_a_run_both(options):
    text = describe_cost(PretrainOptions(preset="tiny", dry_run=True))
    assert "3,000,768" in text
    assert "steps" not in text
    for missing in ("steps", "out"):
        with pytest.raises(InputError, match=f"--{missing}"):
            pretrain(replace(options, **{"out": "runs/x", missing: None}))
