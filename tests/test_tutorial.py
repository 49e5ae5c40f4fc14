"""docs/tutorial.md, block by block, on the real model it names: in this process, to load libraries once."""

import re
import shlex
from pathlib import Path

from stablemask.cli.main import main

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
STEPS = re.compile(r"\$\{STEPS:-\d+\}")
HERE_DOCUMENT = re.compile(r"^python - <<'END'\n(.*?)^END$", re.MULTILINE | re.DOTALL)


def run_python(code: str) -> None:
    exec(compile(code, "docs/tutorial.md", "exec"), {"__name__": "__main__"})


def run_shell(text: str, capsys) -> None:
    """Commands of ours, and Python from a here-document."""
    for code in HERE_DOCUMENT.findall(text):
        run_python(code)
    for line in HERE_DOCUMENT.sub("", text).replace("\\\n", " ").splitlines():
        words = shlex.split(STEPS.sub("2", line))
        if words[:1] == ["stablemask"]:
            assert main(words[1:]) == 0, f"{line}\n{capsys.readouterr().err}"
        elif words:
            # The fixture has run it.
            assert words == shlex.split("python examples/pretrained.py smollm2 --out runs/smollm2")


def test_the_tutorial_runs_as_it_stands(tmp_path, smollm2_folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "smollm2").symlink_to(smollm2_folder)
    blocks = BLOCK.findall((ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"))
    assert len(blocks) == 6
    for language, text in blocks:
        if language == "python":
            run_python(text)
        else:
            run_shell(text, capsys)
    assert (tmp_path / "runs" / "inspect.html").stat().st_size > 10_000
