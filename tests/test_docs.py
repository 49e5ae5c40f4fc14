"""The Python of the docs runs as it stands, block after block, and their links lead somewhere."""

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "docs/attention.md",
    "docs/guide.md",
    "docs/method.md",
    "docs/quickstart.md",
    "docs/transformers.md",
]
# Blocks that read a run folder belong to the commands around them.
NEEDS_A_RUN = re.compile(r"runs/|from_pretrained")


@pytest.fixture
def one_process(monkeypatch):
    """What torchrun tells a process that is alone, for blocks that are run by it."""
    for name, value in {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost", "MASTER_PORT": "0",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_what_the_reference_names_is_there():
    pages = (ROOT / "docs/reference").glob("*.md")
    names = [name for page in pages for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)]
    assert len(names) > 50
    for module, _, name in (name.rpartition(".") for name in names):
        assert hasattr(import_module(module), name) or find_spec(f"{module}.{name}"), name


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, flags=re.S | re.M))
    runnable = [block for block in blocks if not NEEDS_A_RUN.search(block[1])]
    assert runnable
    if page in ("docs/attention.md", "docs/method.md"):
        assert runnable == blocks
    namespace: dict = {}
    for block in runnable:
        lines_before = "\n" * text.count("\n", 0, block.start(1))  # a failure names its line
        exec(compile(lines_before + block[1], page, "exec"), namespace)


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "CONTRIBUTING.md",
        *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")),
    ],
)
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target, _, anchor in re.findall(r"\]\(([^)#]*)(#([^)]*))?\)", _prose(path)):
        if target.startswith("http"):
            continue
        linked = path.parent / target if target else path
        assert linked.exists(), target
        if anchor:
            assert anchor in _anchors(linked), f"{target}#{anchor}"


def _prose(path):
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.S | re.M)


def _anchors(path):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)", _prose(path), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_lessons_say_where_they_are_in_the_code():
    text = (ROOT / "docs/lessons.md").read_text()
    assert len(text.splitlines()) <= 80
    for lesson in re.findall(r"^- .*", text, flags=re.M):
        paths = re.findall(r"`([\w/]+\.(?:py|h|cpp))`", lesson)
        assert paths, lesson
        for path in paths:
            assert any((ROOT / top / path).exists() for top in ("src/stablemask", "")), lesson


def test_the_readme_is_a_front_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert len(text.split()) <= 900


def test_the_tree_that_contributors_see_is_the_tree():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    tree = text.partition("src/stablemask/\n")[2].partition("configs/")[0]
    named = set(re.findall(r"^  (\S+)", tree, flags=re.M))
    there = {
        path.name + "/" * path.is_dir()
        for path in (ROOT / "src/stablemask").iterdir()
        if not path.name.startswith("__")
    }
    assert {name for name in named if name != "->"} == there
