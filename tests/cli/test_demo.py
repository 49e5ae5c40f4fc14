"""`stablemask demo`, from outside the process, on a text of its own."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stablemask.cli.demo import _check_out
from stablemask.cli.main import main

from .test_main import stablemask

STEPS = "4"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"row {i} has mask {i * i % 9973}" for i in range(8000)))
    return str(path)


@pytest.fixture(scope="module")
def demo(text, tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """A demo that Ctrl-C stopped in its first training, and that was gone on with."""
    out = tmp_path_factory.mktemp("demo") / "out"
    argv = ["demo", "--out", str(out), "--steps", STEPS, "--data", text]
    process = subprocess.Popen(
        [sys.executable, "-m", "stablemask", *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    process.stdout.readline()
    while process.poll() is None and not (out / "softmax" / "metrics.jsonl").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert f"--steps {STEPS}" in stdout
    assert stdout.rstrip().endswith("--resume")
    assert not (out / "report.html").exists()
    return out, stablemask(*argv, "--resume")


def test_results_report_and_table(demo):
    out, finished = demo
    assert finished.returncode == 0, finished.stderr
    results = json.loads((out / "results.json").read_text())
    assert list(results["runs"]) == ["softmax", "stablemask"]
    assert results["differences"] == ["attention"]
    assert all(run["record"]["result"]["step"] == 4 for run in results["runs"].values())
    page = (out / "report.html").read_text()
    assert page.count("<figure>") == 7
    shown = f"{results['runs']['stablemask']['perplexity'][0]['perplexity']:.2f}"
    assert shown in page
    assert shown in finished.stdout
    assert str(out / "report.html") in finished.stdout
    commands = finished.stdout.partition("Try next:\n")[2].splitlines()
    assert [shlex.split(command)[1] for command in commands] == ["generate", "evaluate", "pretrain"]
    for command in commands:
        assert shutil.which(shlex.split(command)[0]), command
    assert not list(out.glob(".*"))


def test_nothing_of_the_libraries_on_the_screen(demo):
    _, finished = demo
    for word in ("Warning", "Loading weights", "Traceback"):
        assert word not in finished.stderr + finished.stdout


def test_a_finished_demo_is_not_overwritten_and_not_trained_again(demo, text, capsys):
    out, _ = demo
    weights = out / "softmax" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    argv = ["demo", "--out", str(out), "--data", text, "--steps"]
    assert main([*argv, STEPS]) == 2
    assert "already holds a demo; add --resume" in capsys.readouterr().err
    assert main([*argv, STEPS, "--data", "builtin", "--resume"]) == 2
    assert "started with data " in capsys.readouterr().err
    assert weights.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--data", "absent.txt"], "absent.txt"),
        (["--resume"], "holds no demo to resume"),
    ],
)
def test_bad_input_leaves_nothing_behind(argv, words, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["demo", "--out", str(out), *argv]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("stablemask: error: ")
    assert words in error
    assert not out.exists()


def test_out_must_be_a_folder_of_its_own(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "is not empty and holds no demo" in capsys.readouterr().err
    assert main(["demo", "--out", str(tmp_path / "notes.txt")]) == 2
    assert "is a file" in capsys.readouterr().err


@pytest.mark.parametrize("resume", [True, False])
def test_one_that_was_killed_before_it_had_begun_starts(resume, tmp_path):
    (tmp_path / "softmax").mkdir()
    (tmp_path / "softmax" / ".lock").touch()
    (tmp_path / "softmax" / ".partial-x").mkdir()
    (tmp_path / "softmax" / ".partial-x" / "pretrain.yaml").touch()
    _check_out(tmp_path, resume)
