"""Pretraining as a user runs it: small, but the whole of it."""

import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import stablemask.hf
from stablemask.errors import InputError, RunError
from stablemask.options import load_yaml, save_yaml
from stablemask.training import checkpoints
from stablemask.training.dry_run import describe_cost
from stablemask.training.options import PretrainOptions
from stablemask.training.pretrain import command_line, pretrain

STEPS = 40


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Prose enough for a small run: sentences of a few words in a random order."""
    words = [
        "the",
        "a",
        "model",
        "row",
        "mask",
        "sink",
        "token",
        "head",
        "reads",
        "writes",
        "keeps",
        "gives",
        "its",
        "own",
        "last",
        "first",
    ]
    generator = random.Random(0)
    lines = [" ".join(generator.choices(words, k=12)) + "." for _ in range(1500)]
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setenv("STABLEMASK_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def options(text) -> PretrainOptions:
    return PretrainOptions(
        steps=STEPS, out="", data=str(text), vocab_size=300, context=32, batch_size=2,
        dtype="float32", save_every=4, eval_every=20, eval_tokens=64, log_every=5,
        keep_checkpoints=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(options, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    pretrain(replace(options, out=str(folder)))
    return folder


def command(options: PretrainOptions, *more: str) -> list[str]:
    import shlex

    return [sys.executable, "-m", *shlex.split(command_line(options)), *more]


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(folder: Path, other: Path) -> None:
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_run_leaves_everything_a_user_needs(uninterrupted, options):
    model = AutoModelForCausalLM.from_pretrained(uninterrupted)
    tokenizer = AutoTokenizer.from_pretrained(uninterrupted)
    assert model.config.stablemask == {"gamma": 1 / 32, "horizon": None}
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


def test_the_best_checkpoint_stays_beside_the_last(options, tmp_path, monkeypatch):
    from stablemask.training.trainer import LanguageModelTrainer

    evaluate = LanguageModelTrainer.evaluation_loop

    def worse_from_step_8_on(self, *args, **kwargs):
        output = evaluate(self, *args, **kwargs)
        output.metrics["eval_loss"] += abs(self.state.global_step - 8)
        return output

    monkeypatch.setattr(LanguageModelTrainer, "evaluation_loop", worse_from_step_8_on)
    pretrain(replace(options, out=str(tmp_path), steps=16, eval_every=4, keep_checkpoints=1))
    kept = [path.name for path in checkpoints.list_checkpoints(tmp_path / "checkpoints")]
    assert kept == ["checkpoint-8", "checkpoint-16"]


def test_the_loss_falls_and_the_metrics_say_so(uninterrupted):
    rows = metrics(uninterrupted)
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == list(range(5, STEPS + 1, 5))
    assert training[-1]["loss"] < training[0]["loss"] - 0.5
    assert training[-1]["tokens"] == STEPS * 2 * 32
    assert all(row["tokens_per_second"] > 0 for row in training)
    assert [row["step"] for row in rows if "eval_loss" in row] == [20, 40]


def test_the_same_seed_gives_the_same_weights(uninterrupted, options, tmp_path):
    pretrain(replace(options, out=str(tmp_path / "again")))
    assert_same_weights(tmp_path / "again", uninterrupted)


@pytest.mark.parametrize(
    ("moment", "async_save"),
    [
        ("checkpoint-4", False),
        ("checkpoint-16", True),
        ("incomplete", False),
        ("incomplete", True),
        ("metrics.jsonl", False),
    ],
)
def test_kill_and_resume_gives_the_weights_of_a_run_never_interrupted(
    moment, async_save, uninterrupted, options, tmp_path
):
    folder = tmp_path / "run"
    options = replace(options, out=str(folder), async_save=async_save)
    process = subprocess.Popen(command(options), stderr=subprocess.DEVNULL)
    awaited = folder / moment if "." in moment else folder / "checkpoints" / moment
    while not awaited.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "model.safetensors").exists()
    for checkpoint in checkpoints.list_checkpoints(folder / "checkpoints"):
        checkpoints.verify(checkpoint)

    # How the rest is saved need not be how the first part was.
    result = pretrain(replace(options, resume=True, async_save=not async_save))
    assert result.step == STEPS
    assert_same_weights(folder, uninterrupted)
    steps = [row["step"] for row in metrics(folder) if "loss" in row]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_saves_a_checkpoint_and_the_run_goes_on(
    number, code, uninterrupted, options, tmp_path
):
    folder = tmp_path / "run"
    options = replace(options, out=str(folder), save_every=1000)
    process = subprocess.Popen(
        command(options), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    while not (folder / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "--resume" in stdout
    (checkpoint,) = checkpoints.list_checkpoints(folder / "checkpoints")
    assert 5 <= checkpoints.step_of(checkpoint) < STEPS

    pretrain(replace(options, resume=True))
    assert_same_weights(folder, uninterrupted)


def test_resuming_a_finished_run_changes_nothing(uninterrupted, options):
    before = (uninterrupted / "model.safetensors").stat().st_mtime_ns
    result = pretrain(replace(options, out=str(uninterrupted), resume=True))
    assert result.step == STEPS
    assert (uninterrupted / "model.safetensors").stat().st_mtime_ns == before


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


def test_a_step_that_is_not_finite_is_skipped_and_counted(poisoned, options, tmp_path, capsys):
    result = pretrain(replace(options, out=str(tmp_path / "run"), eval_every=1000, steps=20))
    assert math.isfinite(result.eval_loss)
    assert "step 10 is skipped" in capsys.readouterr().err
    assert [row["step"] for row in metrics(tmp_path / "run") if "skipped_because" in row] == [10]
    assert [r["skipped"] for r in metrics(tmp_path / "run") if "loss" in r] == [0, 1, 1, 1]


def test_too_many_of_them_stop_the_run_before_the_weights(poisoned, options, tmp_path):
    options = replace(options, out=str(tmp_path / "run"), eval_every=1000, skip_limit=1)
    with pytest.raises(RunError, match="not finite at step 10"):
        pretrain(options)
    last = checkpoints.list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    assert last.name == "checkpoint-8"
    checkpoints.verify(last)
    assert all(t.isfinite().all() for t in load_file(last / "model.safetensors").values())


def test_a_full_disk_keeps_the_last_checkpoint(options, tmp_path, monkeypatch):
    from stablemask.training.trainer import Trainer

    save = Trainer._save_optimizer_and_scheduler

    def full(self, output_dir):
        if "checkpoint-8" in output_dir:
            # As torch.save puts it, and as the disk then looks.
            monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0})())
            raise RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos")
        return save(self, output_dir)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
    with pytest.raises(OSError) as caught:
        pretrain(replace(options, out=str(tmp_path / "run")))
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["checkpoint-4"]
    checkpoints.verify(tmp_path / "run" / "checkpoints" / "checkpoint-4")


@pytest.fixture(scope="module")
def written(options, tmp_path_factory) -> Path:
    """Two checkpoints."""
    folder = tmp_path_factory.mktemp("runs") / "written"
    pretrain(replace(options, out=str(folder), steps=8))
    return folder / "checkpoints"


@pytest.fixture
def stop_at(monkeypatch):
    """Stops a run after a step, as a signal does; None lets it go on to its end."""
    from stablemask.training.callbacks import StopOnSignal

    def arrange(step: int | None) -> None:
        def stop(self, args, state, control, **_):
            if state.global_step == step:
                self.received = signal.SIGTERM
                control.should_save = control.should_training_stop = True

        monkeypatch.setattr(StopOnSignal, "on_step_end", stop)

    return arrange


@pytest.fixture
def stopped(options, tmp_path, stop_at) -> PretrainOptions:
    """A run with two checkpoints that did not finish."""
    stop_at(8)
    options = replace(options, out=str(tmp_path / "run"))
    assert pretrain(options).stopped_by is signal.SIGTERM
    stop_at(None)
    return replace(options, resume=True)


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(content[:-7])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_named_and_set_aside(file, how, written, tmp_path, capsys):
    folder = tmp_path / "checkpoints"
    shutil.copytree(written, folder)
    damage(folder / "checkpoint-8" / file, how)
    assert checkpoints.last_whole(folder) == folder / "checkpoint-4"
    assert "checkpoint-8 is damaged" in (said := capsys.readouterr().err)
    assert file in said
    assert sorted(os.listdir(folder)) == ["checkpoint-4", "damaged-checkpoint-8"]
    assert checkpoints.last_whole(folder) == folder / "checkpoint-4"

    damage(folder / "checkpoint-4" / file, how)
    with pytest.raises(InputError, match=r"checkpoint-4 is damaged.*no checkpoint is whole"):
        checkpoints.last_whole(folder)


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing"])
def test_a_manifest_that_is_damaged_damages_the_checkpoint(how, written, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(written, folder)
    damage(folder / "checkpoint-8" / "manifest.json", how)
    assert checkpoints.last_whole(folder) == folder / "checkpoint-4"


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(stopped, uninterrupted):
    damage(Path(stopped.out) / "checkpoints" / "checkpoint-8" / "optimizer.pt", "flipped")
    pretrain(stopped)
    assert_same_weights(Path(stopped.out), uninterrupted)


@pytest.mark.parametrize("kind", ["stream", "mixture", "mixture of streams"])
def test_other_data_goes_on_where_it_stopped(kind, options, uninterrupted, tmp_path, stop_at):
    """Two sources, with loading processes in one part of the run."""
    records = tmp_path / "records.jsonl"
    generator = random.Random(1)
    lines = [
        generator.choices(["the", "a", "model", "row", "mask", "sink", "token", "head"], k=30)
        for _ in range(300)
    ]
    records.write_text("".join(json.dumps({"text": " ".join(line)}) + "\n" for line in lines))
    changes = {"steps": 10, "save_every": 100, "tokenizer": str(uninterrupted)}
    if "stream" in kind:
        changes |= {"streaming": True, "shuffle_buffer": 64, "data": str(records)}
    if "mixture" in kind:
        other = tmp_path / "other.jsonl"
        other.write_text(records.read_text().replace("the", "one"))
        changes |= {"data": "builtin", "mixture": [f"{records}=3", f"{other}=1"]}
    options = replace(options, **changes)
    pretrain(replace(options, out=str(tmp_path / "whole")))
    options = replace(options, out=str(tmp_path / "parts"), workers=2)
    stop_at(5)
    assert pretrain(options).step == 5
    stop_at(None)
    pretrain(replace(options, resume=True, workers=0))
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")


def test_resume_wants_the_same_settings_and_the_same_text(stopped, text, tmp_path):
    with pytest.raises(InputError, match="learning_rate"):
        pretrain(replace(stopped, learning_rate=1e-4))
    moved = tmp_path / "prose.txt"
    moved.write_text(text.read_text())
    yaml = Path(stopped.out) / "pretrain.yaml"
    yaml.write_text(yaml.read_text().replace(stopped.data, str(moved)))
    moved.write_text(text.read_text().replace("token", "taken"))
    with pytest.raises(InputError, match="has changed"):
        pretrain(replace(stopped, data=str(moved)))


def test_the_run_folder_is_guarded(uninterrupted, options, tmp_path):
    with pytest.raises(InputError, match="already holds a run"):
        pretrain(replace(options, out=str(uninterrupted)))
    with pytest.raises(InputError, match="no run to resume"):
        pretrain(replace(options, out=str(tmp_path / "nothing"), resume=True))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("do not touch")
    with pytest.raises(InputError, match="not empty"):
        pretrain(replace(options, out=str(tmp_path / "full")))
    with pytest.raises(InputError, match="is a file"):
        pretrain(replace(options, out=str(tmp_path / "full" / "thesis.tex")))


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
        ({"attention": "softmax", "gamma": 0.1}, "gamma"),
        ({"batch_size": 0}, "batch_size"),
        ({"context": 1}, "context"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"beta2": 1.5}, "beta2"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"wandb": True}, "wandb"),
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


def test_cost_of_a_large_model_without_allocating_it():
    start = time.perf_counter()
    text = describe_cost(PretrainOptions(steps=10, out="unused", preset="1.4b"))
    assert "1,415,677,952" in text
    assert "FLOPs per token" in text
    assert "GiB" in text
    assert time.perf_counter() - start < 60
    assert not Path("unused").exists()


def test_the_command_line_gives_the_same_options(options):
    import shlex

    from stablemask.cli.parser import parse_options

    options = replace(
        options, out="runs/a b", tensorboard=False, gamma="slopes", data="builtin",
        mixture=["some text.txt=0.5", "builtin=1"],
    )  # fmt: skip
    words = shlex.split(command_line(options))[2:]
    assert parse_options(PretrainOptions, words, prog="p", description="") == options


@pytest.mark.parametrize("attention", ["softmax", "softmax1", "learned-sink"])
def test_other_kinds_of_attention_train(attention, options, tmp_path):
    result = pretrain(
        replace(
            options, out=str(tmp_path / "run"), attention=attention, position="alibi", steps=4,
            gradient_accumulation=2, gradient_checkpointing=True, dtype="bfloat16",
        )
    )  # fmt: skip
    assert result.step == 4
    assert result.perplexity < 400
    assert stablemask.hf.load_model(str(result.folder)).config.attention == attention


def test_a_dry_run_needs_neither_steps_nor_a_folder_and_a_run_both(options):
    text = describe_cost(PretrainOptions(preset="tiny", dry_run=True))
    assert "3,000,768" in text
    assert "steps" not in text
    for missing in ("steps", "out"):
        with pytest.raises(InputError, match=f"--{missing}"):
            pretrain(replace(options, **{"out": "runs/x", missing: None}))


def test_progress_without_a_terminal_is_a_line_a_log(options, tmp_path, capsys):
    pretrain(replace(options, out=str(tmp_path / "run"), steps=10))
    lines = [line for line in capsys.readouterr().err.splitlines() if "tokens/s" in line]
    assert [line.partition(":")[0] for line in lines] == ["step 5/10", "step 10/10"]
    assert all("loss" in line and "left" in line for line in lines)


def test_a_run_killed_as_it_began_goes_on(options, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".pretrain.yaml.7.partial").write_text("preset: ti")
    options = replace(options, out=str(folder))
    with pytest.raises(InputError, match="no run to resume"):
        pretrain(replace(options, resume=True))
    save_yaml(options.resolved(), folder / "pretrain.yaml")
    pretrain(replace(options, resume=True))
    assert_same_weights(folder, uninterrupted)
    assert json.loads((folder / "run.json").read_text())["result"]["step"] == STEPS


def test_what_a_kill_left_hidden_does_not_block_a_new_run(options, tmp_path):
    (tmp_path / ".pretrain.yaml.7.partial").write_text("preset: ti")
    assert pretrain(replace(options, out=str(tmp_path), steps=2)).step == 2
