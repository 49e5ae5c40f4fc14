"""Pretraining that stops, is killed or loses a checkpoint, and goes on to the same weights."""

import errno
import io
import json
import math
import os
import pickle
import random
import shlex
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from stablemask.backends import native
from stablemask.backends.native import tuning
from stablemask.cli.main import main
from stablemask.errors import InputError
from stablemask.options import load_yaml, save_yaml
from stablemask.training import checkpoints
from stablemask.training.finetune import finetune
from stablemask.training.finetune_options import FinetuneOptions
from stablemask.training.pretrain import pretrain
from stablemask.training.pretrain_options import PretrainOptions
from stablemask.training.run import begin_run, command_line
from tests import marks
from tests.processes import start
from tests.test_reading import DEEP

from .conftest import STEPS, assert_same_weights, kill_when_there, metrics, stop_at


def test_the_best_checkpoint_stays_beside_the_last(options, tmp_path, monkeypatch):
    from stablemask.training.trainer import LanguageModelTrainer

    evaluate = LanguageModelTrainer.evaluation_loop

    def best_at_step_10(self, *args, **kwargs):  # of which there is no checkpoint
        output = evaluate(self, *args, **kwargs)
        output.metrics["eval_loss"] = abs(self.state.global_step - 9.5)
        return output

    monkeypatch.setattr(LanguageModelTrainer, "evaluation_loop", best_at_step_10)
    pretrain(replace(options, out=str(tmp_path), steps=16, eval_every=2, keep_checkpoints=1))
    kept = [path.name for path in checkpoints.list_checkpoints(tmp_path / "checkpoints")]
    assert kept == ["checkpoint-8", "checkpoint-16"]


@pytest.mark.parametrize(
    ("moment", "async_save"),
    [
        ("checkpoint-4", False),
        pytest.param("checkpoint-16", True, marks=marks.nightly),
        pytest.param("incomplete", False, marks=marks.nightly),
        ("incomplete", True),
        pytest.param("metrics.jsonl", False, marks=marks.nightly),
    ],
)
def test_kill_and_resume_gives_the_weights_of_a_run_never_interrupted(
    moment, async_save, uninterrupted, options, tmp_path
):
    folder = tmp_path / "run"
    options = replace(options, out=str(folder), async_save=async_save)
    awaited = folder / moment if "." in moment else folder / "checkpoints" / moment
    kill_when_there(awaited, start(pretrain, options))
    assert not (folder / "model.safetensors").exists()
    for checkpoint in checkpoints.list_checkpoints(folder / "checkpoints"):
        checkpoints.verify(checkpoint)

    # How the rest is saved need not be how the first part was.
    result = pretrain(replace(options, resume=True, async_save=not async_save))
    assert result.step == STEPS
    assert_same_weights(folder, uninterrupted)
    steps = [row["step"] for row in metrics(folder) if "loss" in row]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 0, marks=marks.nightly)],
)
def test_a_signal_saves_a_checkpoint_and_the_run_goes_on(
    number, code, uninterrupted, options, tmp_path
):
    folder = tmp_path / "run"
    options = replace(options, out=str(folder), save_every=1000)
    output = tmp_path / "output"
    process = start(main, shlex.split(command_line(options))[1:], output=output)
    while not (folder / "metrics.jsonl").exists():
        assert process.is_alive()
        time.sleep(0.001)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == code
    assert "--resume" in output.read_text()
    (checkpoint,) = checkpoints.list_checkpoints(folder / "checkpoints")
    assert 5 <= checkpoints.step_of(checkpoint) < STEPS

    pretrain(replace(options, resume=True))
    assert_same_weights(folder, uninterrupted)


def test_a_run_that_goes_on_by_other_kernels_says_so(tmp_path, monkeypatch, capsys):
    options = PretrainOptions(data="text", out=str(tmp_path), steps=2)

    def told():
        begin_run(tmp_path, options, "key", {"command": "a command"})
        return capsys.readouterr().err

    monkeypatch.setattr(native, "RULES", {"forward_by_tiles": {"float32": [(129, None)]}})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert told() == ""
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["attention_on_cpu"]["in_words"]["float32"] == "forward by tiles, rows from 129 on"
    assert told() == ""
    monkeypatch.setattr(native, "RULES", {})
    line = told()
    assert line.count("\n") == 1
    assert all(
        tuning.digest(rules) in line
        for rules in ({}, {"forward_by_tiles": {"float32": [(129, None)]}})
    )
    record.pop("attention_on_cpu")  # as older versions began a run
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert told() == ""


def test_resuming_a_finished_run_changes_nothing(uninterrupted, options):
    before = (uninterrupted / "model.safetensors").stat().st_mtime_ns
    result = pretrain(replace(options, out=str(uninterrupted), resume=True))
    assert result.step == STEPS
    assert (uninterrupted / "model.safetensors").stat().st_mtime_ns == before


@pytest.fixture
def rates(monkeypatch) -> list[float]:
    """The learning rate of every step."""
    from stablemask.training.trainer import LanguageModelTrainer

    step, seen = LanguageModelTrainer.training_step, []

    def record(self, *args):
        seen.append(self.optimizer.param_groups[0]["lr"])
        return step(self, *args)

    monkeypatch.setattr(LanguageModelTrainer, "training_step", record)
    return seen


@pytest.mark.parametrize("in_shards", [False, True])
def test_a_finished_run_goes_on_to_more_steps(in_shards, options, rates, tmp_path):
    def cosine(step: int, steps: int) -> float:
        """Two steps of warm-up, then down to a tenth."""
        share = (step - 2) / (steps - 2)
        falling = 0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2
        return 1e-3 * (step / 2 if step < 2 else falling)

    folder = tmp_path / "run"
    options = replace(options, out=str(folder), steps=20, async_save=in_shards)
    pretrain(options)
    assert rates == pytest.approx([cosine(step, 20) for step in range(20)])
    rates.clear()
    more = replace(options, steps=30, resume=True, save_every=5, eval_every=10)
    assert pretrain(more).step == 30
    assert rates == pytest.approx([cosine(step, 30) for step in range(20, 30)])

    rates.clear()
    assert pretrain(more).step == 30
    assert rates == []
    written = load_yaml(folder / "pretrain.yaml")
    assert (written["steps"], written["warmup"], written["resume"]) == (30, 2, False)
    assert "--steps 30" in json.loads((folder / "run.json").read_text())["command"]
    assert [row["step"] for row in metrics(folder) if "loss" in row] == list(range(5, 31, 5))
    # Given anew, these count from here on, and for a part that does not give them.
    assert [row["step"] for row in metrics(folder) if "eval_loss" in row] == [20, 30]
    assert (written["save_every"], written["eval_every"]) == (5, 10)
    saved = checkpoints.list_checkpoints(folder / "checkpoints")
    assert [checkpoints.step_of(one) for one in saved] == [20, 25, 30]
    with pytest.raises(InputError, match="taken 30 steps already, and --steps asks for 29"):
        pretrain(replace(more, steps=29))
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(InputError, match="holds no checkpoint of them to go on from"):
        pretrain(replace(more, steps=40))


def test_adapting_keeps_its_schedule_when_it_goes_on(base, prose, tmp_path):
    options = FinetuneOptions(
        model=str(base), data=str(prose), adapt=True, lora=True, steps=4, out=str(tmp_path / "run"), context=32,
        batch_size=2, dtype="float32", final_eval_tokens=64, eval_tokens=64, log_every=1,
    )  # fmt: skip
    finetune(options)
    assert finetune(replace(options, steps=6, resume=True)).step == 6
    written = load_yaml(tmp_path / "run" / "finetune.yaml")
    assert (written["steps"], written["texts"]) == (6, 4)
    rows = [row for row in metrics(tmp_path / "run") if "alpha" in row]
    assert [row["alpha"] for row in rows] == [pytest.approx(3 / 8), 0.0, 0.0, 0.0, 0.0, 0.0]


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


@pytest.mark.parametrize("how", ["truncated", "flipped", "missing", "nested"])
def test_a_manifest_that_is_damaged_damages_the_checkpoint(how, written, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(written, folder)
    if how == "nested":
        (folder / "checkpoint-8" / "manifest.json").write_text(DEEP)
    else:
        damage(folder / "checkpoint-8" / "manifest.json", how)
    assert checkpoints.last_whole(folder) == folder / "checkpoint-4"


@pytest.fixture
def stopped(options, tmp_path, monkeypatch) -> PretrainOptions:
    """A run with two checkpoints that did not finish."""
    stop_at(8, monkeypatch)
    options = replace(options, out=str(tmp_path / "run"))
    assert pretrain(options).stopped_by is signal.SIGTERM
    stop_at(None, monkeypatch)
    return replace(options, resume=True)


class Hostile:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def poison(checkpoint: Path, file: str, hostile: Hostile) -> None:
    """Put it into a file of a checkpoint, whose hashes are made to fit."""
    if file == "a number of the optimizer":
        state = checkpoint / "state"
        index = pickle.loads((state / ".metadata").read_bytes())
        place, entry = next((k, v) for k, v in index.storage_data.items() if k.fqn.endswith(".lr"))
        content = io.BytesIO()
        torch.save(hostile, content)
        (state / "hostile").write_bytes(content.getvalue())
        other = replace(entry, relative_path="hostile", offset=0, length=len(content.getvalue()))
        index.storage_data[place] = other
        (state / ".metadata").write_bytes(pickle.dumps(index))
    elif file.endswith(".metadata"):
        (checkpoint / file).write_bytes(pickle.dumps(hostile))
    else:
        torch.save(hostile, checkpoint / file)
    (checkpoint / checkpoints.MANIFEST).unlink()
    checkpoints.commit(checkpoint, checkpoint)


@pytest.fixture(scope="module")
def foreign(request, options, tmp_path_factory) -> PretrainOptions:
    """A run that stopped and is gone on with, from someone else."""
    folder = tmp_path_factory.mktemp("foreign") / "run"
    options = replace(options, out=str(folder), async_save=request.param == "in shards")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(1, patch)
        pretrain(options)
    return replace(options, resume=True)


@pytest.mark.parametrize(
    ("foreign", "file"),
    [
        ("whole", "optimizer.pt"),
        ("whole", "pytorch_model.bin"),
        ("in shards", "state/.metadata"),
        ("in shards", "a number of the optimizer"),
        ("in shards", "scheduler.pt"),
        ("in shards", "rng_state.pth"),
    ],
    indirect=["foreign"],
)
def test_nothing_in_a_foreign_checkpoint_runs(foreign, file, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(foreign.out, run)
    checkpoint = run / "checkpoints" / "checkpoint-1"
    if file == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    poison(checkpoint, file, Hostile(tmp_path / "it ran"))
    poison(checkpoint, "training_args.bin", Hostile(tmp_path / "it ran"))
    with pytest.raises(
        InputError, match=r"checkpoint-1 is no checkpoint of this run.*more than data"
    ):
        pretrain(replace(foreign, out=str(run)))
    assert not (tmp_path / "it ran").exists()


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(stopped, uninterrupted):
    damage(Path(stopped.out) / "checkpoints" / "checkpoint-8" / "optimizer.pt", "flipped")
    pretrain(stopped)
    assert_same_weights(Path(stopped.out), uninterrupted)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("stream", marks=marks.nightly),
        pytest.param("mixture", marks=marks.nightly),
        "mixture of streams",
    ],
)
def test_other_data_goes_on_where_it_stopped(kind, options, uninterrupted, tmp_path, monkeypatch):
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
    stop_at(5, monkeypatch)
    assert pretrain(options).step == 5
    stop_at(None, monkeypatch)
    pretrain(replace(options, resume=True, workers=0))
    assert_same_weights(tmp_path / "parts", tmp_path / "whole")


def test_resume_wants_the_same_settings_and_the_same_text(stopped, prose, tmp_path):
    with pytest.raises(InputError, match="learning_rate"):
        pretrain(replace(stopped, learning_rate=1e-4))
    moved = tmp_path / "prose.txt"
    moved.write_text(prose.read_text())
    yaml = Path(stopped.out) / "pretrain.yaml"
    yaml.write_text(yaml.read_text().replace(stopped.data, str(moved)))
    moved.write_text(prose.read_text().replace("token", "taken"))
    with pytest.raises(InputError, match="has changed"):
        pretrain(replace(stopped, data=str(moved)))


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
