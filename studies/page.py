"""The page of results: texts that a person has written, filled with what the studies have recorded."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, StrictUndefined

from benchmarks.tables import records_table, table
from stablemask import __version__
from stablemask.errors import InputError
from stablemask.report.drawing import STYLE
from stablemask.writing import whole_file, write_whole

from .paper import first_table
from .runner import load_study
from .study import Claim, Section, Study, Verdict

TEXTS = Path(__file__).parent / "text"
# Of the table of runs: heads, and what stands under them.
_RUN = (
    ("study", "{study}"), ("date", "{date}"), ("machine", "{hardware}"),
    ("jobs at a time", "{workers}"), ("python", "{python}"), ("torch", "{torch}"),
    ("transformers", "{transformers}"), ("scale", "{scale}"), ("seeds", "{seeds}"),
    ("minutes", "{minutes:.0f}"), ("command", "`{command}`"),
)  # fmt: skip
_TEMPLATES = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def text_of(name: str) -> str:
    """The template of a study, or of the page around them."""
    return (TEXTS / f"{name}.md").read_text(encoding="utf-8")


def write_page(studies: dict[str, Study], out: Path, page: Path) -> list[str]:
    """Write ``page``, and the figures beside the records in ``out``; the claims with their verdicts, as text.

    The same records give the same page.

    Raises:
        InputError: ``out`` holds no record of a study, or a damaged one.
    """
    documents = load_documents(studies, out)
    with matplotlib.rc_context(STYLE):
        sections = {name: _section(studies[name], found) for name, found in documents.items()}
        for name, section in sections.items():
            for figure, drawn in section.figures.items():
                with whole_file(out / f"{name}-{figure}.png") as partial:
                    drawn.savefig(partial, dpi=130, metadata={"Software": None})
    figures = Path(os.path.relpath(out, page.parent))
    filled = _TEMPLATES.from_string(text_of("page")).render(
        paper=first_table({name: found["records"] for name, found in documents.items()}, sections),
        missing=[name for name in studies if name not in documents],
        sections=[
            _filled(studies[name], section, _left(documents[name]), figures)
            for name, section in sections.items()
        ],
        runs=_runs_table(documents),
    )
    write_whole(page, re.sub(r"\n{3,}", "\n\n", filled.strip()) + "\n")
    return [
        f"{claim.verdict:<20} {claim.statement}"
        for section in sections.values()
        for claim in section.claims
    ]


def verdicts(studies: dict[str, Study], out: Path) -> dict[tuple[str, str], Verdict]:
    """What a folder of results comes to, by study and statement.

    Raises:
        InputError: it holds no record of a study, or a damaged one.
    """
    return {
        (name, claim.statement): claim.verdict
        for name, document in load_documents(studies, out).items()
        for claim in _section(studies[name], document).claims
    }


def load_documents(studies: dict[str, Study], out: Path) -> dict[str, dict[str, Any]]:
    """What a folder holds of the studies, by name.

    Raises:
        InputError: nothing, or a damaged record.
    """
    documents = {name: found for name in studies if (found := load_study(out, name)) is not None}
    if not documents:
        raise InputError(f"{out} holds no results of a study; run one first")
    return documents


def _section(study: Study, document: dict[str, Any]) -> Section:
    try:
        return study.section(document["records"])
    except (KeyError, TypeError) as error:
        raise InputError(
            f"the results of {study.name} are of another version of stablemask than "
            f"{__version__}: {error!r}"
        ) from error


def _left(document: dict[str, Any]) -> str:
    done = len(document["records"])
    jobs = document.get("jobs", done)
    return f"*{done} of {jobs} trainings are done. This tells of those.*\n\n" if done < jobs else ""


def _filled(study: Study, section: Section, left: str, figures: Path) -> str:
    def figure(name: str, text: str) -> str:
        return f"![{text}]({(figures / f'{study.name}-{name}.png').as_posix()})"

    def verdict(begin: str) -> Verdict:
        return next(claim.verdict for claim in section.claims if claim.statement.startswith(begin))

    claims = [[claim.statement, _count(claim), f"**{claim.verdict}**"] for claim in section.claims]
    body = _TEMPLATES.from_string(study.text).render(
        claims=table(["claim", "holds in", "verdict"], claims),
        verdict=verdict,
        figure=figure,
        tables=section.tables,
        **section.facts,
    )
    return f"## {study.title}\n\n{left}{body.strip()}"


def _count(claim: Claim) -> str:
    unclear = claim.holds.count(None)
    text = f"{sum(map(bool, claim.holds))} of {len(claim.holds)}"
    return f"{text}, {unclear} open" if unclear else text


def _runs_table(documents: dict[str, dict[str, Any]]) -> str:
    runs = [
        {
            **document,
            **document["versions"],
            "minutes": document["job_seconds"] / 60,
            # As it is given today; before the studies left the package it had another name.
            "command": document["command"].replace("stablemask reproduce", "python -m studies", 1),
        }
        for document in documents.values()
    ]
    return records_table(runs, _RUN)
