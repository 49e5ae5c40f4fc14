"""docs/tutorial.md, block by block, on the real model it names."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_tutorial_runs_as_it_stands(tmp_path, smollm2_folder):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "smollm2").symlink_to(smollm2_folder)
    blocks = BLOCK.findall((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"))
    assert len(blocks) == 6
    programs = Path(sys.executable).parent
    environment = os.environ | {"STEPS": "2", "PATH": f"{programs}:{os.environ['PATH']}"}
    for language, text in blocks:
        command = ["bash", "-e", "-c", text] if language == "sh" else [sys.executable, "-c", text]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        if run.returncode:
            pytest.fail(f"{text}\n{run.stdout}\n{run.stderr}")
    assert (tmp_path / "runs" / "inspect.html").stat().st_size > 10_000
