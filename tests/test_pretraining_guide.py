"""docs/pretraining.md, its commands one after another, but for those that need more than one machine."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^(<!-- needs .*-->\n)?```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_commands_of_the_guide_run_as_they_stand(tmp_path):
    for recipe in (ROOT / "configs" / "pretrain").iterdir():
        (tmp_path / recipe.name).symlink_to(recipe)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    blocks = BLOCK.findall((ROOT / "docs" / "pretraining.md").read_text(encoding="utf-8"))
    run = [text for needs, text in blocks if not needs]
    assert len(run) == 9
    for text in run:
        result = subprocess.run(
            ["bash", "-e", "-c", text],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        if result.returncode:
            pytest.fail(f"{text}\n{result.stdout}\n{result.stderr}")
    for name in ("first", "streamed", "mixed", "ddp", "accelerate", "fsdp", "long"):
        assert (tmp_path / "runs" / name / "model.safetensors").exists()
