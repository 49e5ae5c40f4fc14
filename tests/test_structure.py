"""docs/structure.md says who imports whom, and so it is."""

import ast
import functools
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/stablemask"
PAGE = (ROOT / "docs/structure.md").read_text()
ROWS = {
    name: set(re.findall(r"`(\w+)`", imports))
    for name, imports in re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", PAGE, flags=re.M)
}
GROUND = set(re.findall(r"`(\w+)`", PAGE.partition("Files that any")[2].partition("\n\n")[0]))


@functools.cache
def imported(file, top):
    """The modules that a file of the package or folder ``top`` names, anywhere in it, from the root down."""
    package = (top.name, *file.relative_to(top).parts[:-1])
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else ()
            module = [*above, *(node.module or "").split(".")] if node.module else [*above]
            names += [[*module, alias.name] for alias in node.names]
    return names


def imports_of(part):
    files = (
        [PACKAGE / f"{part}.py"]
        if (PACKAGE / f"{part}.py").exists()
        else (PACKAGE / part).rglob("*.py")
    )
    names = {
        name[1] for file in files for name in imported(file, PACKAGE) if name[0] == "stablemask"
    }
    return {name for name in names if name in ROWS or name in GROUND} - {part}


def test_the_page_names_every_part():
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert set(ROWS) | GROUND == {part for part in parts if not part.startswith("__")}


@pytest.mark.parametrize("part", ROWS)
def test_a_part_imports_what_its_row_says_and_nothing_above_it(part):
    assert imports_of(part) - GROUND == ROWS[part]
    below = list(ROWS)[list(ROWS).index(part) + 1 :]
    assert ROWS[part] <= set(below)


def test_files_for_all_import_only_each_other():
    assert set().union(*map(imports_of, GROUND)) <= GROUND


@pytest.mark.parametrize(
    ("folder", "above"),
    [
        ("src/stablemask", {"benchmarks", "studies", "tests"}),
        ("benchmarks", {"studies", "tests"}),
        ("studies", {"tests"}),
    ],
)
def test_what_is_below_knows_nothing_of_what_is_above(folder, above):
    for file in (ROOT / folder).rglob("*.py"):
        assert not above & {name[0] for name in imported(file, ROOT / folder)}, file


def test_no_circle_of_files():
    files = {
        file.relative_to(ROOT / "src").with_suffix("").parts: file for file in PACKAGE.rglob("*.py")
    }
    files = {name[:-1] if name[-1] == "__init__" else name: file for name, file in files.items()}

    def file_of(name):
        return next((head for head in (tuple(name), tuple(name[:-1])) if head in files), None)

    graph = {
        name: {file_of(other) for other in imported(file, PACKAGE)} - {None, name}
        for name, file in files.items()
    }
    assert sum(map(len, graph.values())) > len(files)
    list(TopologicalSorter(graph).static_order())  # raises CycleError, with the circle


def test_nothing_but_serve_needs_the_packages_of_a_server():
    """Nor vLLM, which it starts as another process."""
    packages = {"openai", "pydantic", "pydantic_core", "starlette", "uvicorn", "vllm"}
    modules = (["stablemask", "inference", "serving"], ["stablemask", "cli", "serve"])
    needing = {
        file.relative_to(PACKAGE)
        for file in PACKAGE.rglob("*.py")
        for name in imported(file, PACKAGE)
        if name[0] in packages or name[:3] in modules
    }
    folders = (Path("inference/serving"), Path("vllm"))
    assert {file for file in needing if file.parent not in folders} == {Path("cli/serve.py")}


def test_what_the_first_import_loads():
    program = (
        "import sys, stablemask; assert 'torch' not in sys.modules; stablemask.sink_attention\n"
        "print(*{'transformers', 'datasets', 'matplotlib', 'yaml', 'torch.distributed.tensor'}"
        ".intersection(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (run.stdout, run.stderr) == ("\n", "")
