"""docs/pretraining.md, its commands one after another, but for those that need more than one machine.

What starts one process runs in this one, for the sake of time; what starts two by torchrun is read here
and run at night: tests/training/test_distributed.py does the same on texts of its own.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from stablemask.cli.main import main
from stablemask.cli.parser import parse_options
from stablemask.training.pretrain_options import PretrainOptions
from tests import marks

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^(<!-- needs .*-->\n)?```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?=stablemask |torchrun |accelerate |python |head )", re.MULTILINE)
BLOCKS = [
    text
    for needs, text in BLOCK.findall((ROOT / "docs/pretraining.md").read_text(encoding="utf-8"))
    if not needs
]
COMMANDS = [command for text in BLOCKS for command in COMMAND.split(text) if command]
LAUNCHED = [command for command in COMMANDS if command.startswith("torchrun")]


def shell(command: str, folder: Path) -> None:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        ["bash", "-e", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
    )
    if result.returncode:
        pytest.fail(f"{command}\n{result.stdout}\n{result.stderr}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where all but the launched commands have run."""
    folder = tmp_path_factory.mktemp("guide")
    for recipe in (ROOT / "configs" / "pretrain").iterdir():
        (folder / recipe.name).symlink_to(recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in COMMANDS:
            if command.startswith("stablemask"):
                assert main(shlex.split(command)[1:]) == 0, command
            elif command not in LAUNCHED:
                shell(command, folder)
    return folder


def model(folder: Path, name: str) -> Path:
    return folder / "runs" / name / "model.safetensors"


def test_the_commands_of_the_guide_run_as_they_stand(folder):
    assert (len(BLOCKS), len(COMMANDS), len(LAUNCHED)) == (9, 12, 3)
    for name in ("first", "streamed", "mixed", "accelerate"):
        assert model(folder, name).exists()


@pytest.mark.parametrize("command", LAUNCHED)
def test_what_torchrun_starts_can_be_read(command, monkeypatch):
    launcher, _, options = command.partition(" -m stablemask pretrain ")
    assert launcher == "torchrun --standalone --nproc-per-node 2"
    monkeypatch.setenv("WORLD_SIZE", "2")
    parse_options(PretrainOptions, shlex.split(options)).resolved()


@marks.nightly
@pytest.mark.parametrize("command", LAUNCHED)
def test_what_torchrun_starts_runs(command, folder):
    shell(command, folder)
    assert model(folder, Path(shlex.split(command)[-1]).name).exists()
