"""Commands that are printed to be copied: what a shell finds under them is this installation."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from stablemask import shell
from stablemask.shell import pip_install, runnable


@pytest.fixture
def environment(tmp_path, monkeypatch) -> Path:
    """A clone with an environment in ``.venv`` that runs this, and another one whose ``bin`` is on the path."""
    for folder in (tmp_path / "a clone/.venv/bin", tmp_path / "other/bin"):
        folder.mkdir(parents=True)
        for name in ("python", "stablemask", "pip"):
            (folder / name).write_text(f"#!/bin/sh\necho {folder.parent.name} {name} $@\n")
            (folder / name).chmod(0o755)
    clone = tmp_path / "a clone"
    (clone / "pyproject.toml").touch()
    monkeypatch.setattr(sys, "executable", str(clone / ".venv/bin/python"))
    monkeypatch.setattr(shell, "_CLONE", clone)
    monkeypatch.setenv("PATH", f"{tmp_path / 'other/bin'}:/usr/bin:/bin")
    monkeypatch.chdir(clone)
    return clone


def said(command: str) -> str:
    return subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True).stdout


def test_without_an_active_environment(environment, monkeypatch, tmp_path):
    command = runnable("stablemask demo --resume")
    assert command == ".venv/bin/stablemask demo --resume"
    assert said(command) == ".venv stablemask demo --resume\n"
    assert said(pip_install("serve")) == ".venv pip install -e .[serve]\n"
    monkeypatch.chdir(tmp_path)  # elsewhere
    assert said(runnable("stablemask env")) == ".venv stablemask env\n"
    assert said(pip_install("serve")) == ".venv pip install -e a clone[serve]\n"
    (environment / ".venv/bin/stablemask").unlink()
    assert said(runnable("stablemask env")) == ".venv python -m stablemask env\n"


def test_in_an_active_environment(environment, monkeypatch):
    monkeypatch.setenv("PATH", f"{environment / '.venv/bin'}:/usr/bin:/bin")
    assert runnable("stablemask demo") == "stablemask demo"
    assert runnable("stablemask") == "stablemask"
    assert pip_install("serve") == "pip install -e '.[serve]'"


def test_what_was_not_installed_from_a_clone(environment, monkeypatch, tmp_path):
    monkeypatch.setattr(shell, "_CLONE", tmp_path)
    assert pip_install("serve") == "pip install '.[serve]' in a clone of stablemask"


def test_no_other_place_tells_how_to_install_a_part():
    root = Path(shell.__file__).parents[2]
    pages = [*root.glob("src/**/*.py"), *root.glob("examples/*"), *root.glob("docs/*.md")]
    named = [page.name for page in pages if re.search(r"install.*stablemask\[", page.read_text())]
    assert named == []
    assert shlex.split(pip_install("all"))[-1].endswith("[all]")
