"""The Python of README and the derivation runs as it stands, block after block."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Blocks that read a run folder belong to the commands around them.
NEEDS_A_RUN = re.compile(r"runs/|from_pretrained")


@pytest.mark.parametrize("page", ["README.md", "docs/method.md"])
def test_python_blocks_run(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.S)
    runnable = [block for block in blocks if not NEEDS_A_RUN.search(block)]
    assert runnable
    namespace: dict = {}
    for block in runnable:
        exec(compile(block, page, "exec"), namespace)


@pytest.mark.parametrize("page", ["README.md", *(p.name for p in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    path = ROOT / page if (ROOT / page).exists() else ROOT / "docs" / page
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


def test_the_tree_of_the_readme_is_the_tree():
    text = (ROOT / "README.md").read_text()
    tree = text.partition("src/stablemask/\n")[2].partition("configs/")[0]
    named = set(re.findall(r"^  (\S+)", tree, flags=re.M))
    there = {
        path.name + "/" * path.is_dir()
        for path in (ROOT / "src/stablemask").iterdir()
        if not path.name.startswith("__")
    }
    assert {name for name in named if name != "->"} == there
