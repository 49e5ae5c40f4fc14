"""The page in docs/ is what the texts and the records beside it give, and the studies import one way."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from studies.command import STUDIES
from studies.page import load_documents, write_page

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "docs/results/reproduce"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    out = folder / "results/reproduce"
    out.mkdir(parents=True)
    for record in RECORDS.glob("*.json"):
        (out / record.name).symlink_to(record)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, path, **options: path.touch())
        write_page(STUDIES, out, folder / "results.md")
    return folder


def test_the_page_of_the_docs_is_made_of_its_records(page):
    assert (page / "results.md").read_text() == (ROOT / "docs/results.md").read_text()


def test_every_table_and_figure_is_on_the_page(page):
    text = (page / "results.md").read_text()
    for name, document in load_documents(STUDIES, RECORDS).items():
        section = STUDIES[name].section(document["records"])
        assert all(section.tables.values())
        assert all(table in text for table in section.tables.values())
        for claim in section.claims:
            assert f"| {claim.statement} |" in text
    drawn = {path.name for path in (page / "results/reproduce").glob("*.png")}
    assert drawn == set(re.findall(r"\(results/reproduce/(.*\.png)\)", text))
    assert drawn == {path.name for path in RECORDS.glob("*.png")}


def test_studies_import_in_one_direction():
    imports = {}
    for path in (ROOT / "studies").glob("*.py"):
        found = [
            node
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ImportFrom)
        ]
        own = [node for node in found if node.level == 1]
        imports[path.stem] = {node.module for node in own if node.module}
        imports[path.stem] |= {name.name for node in own if not node.module for name in node.names}
    assert list(TopologicalSorter(imports).static_order())[-1] == "__main__"
