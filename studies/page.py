"""The page of results, made of what the studies have written, and of nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import matplotlib

from stablemask import __version__
from stablemask.errors import InputError
from stablemask.report.drawing import STYLE

from .runner import load_study
from .study import Section, Study

VERSIONS = ("python", "torch", "transformers")


def write_page(studies: dict[str, Study], out: Path, page: Path) -> list[str]:
    """Write ``page``, and the figures beside the records in ``out``; the claims with their verdicts, as text.

    The same records give the same page.

    Raises:
        InputError: ``out`` holds no record of a study, or a damaged one.
    """
    documents = load_documents(studies, out)
    with matplotlib.rc_context(STYLE):
        sections = {name: _section(studies[name], found) for name, found in documents.items()}
        _draw(sections, out)
    figures = os.path.relpath(out, page.parent)
    parts = [_head(studies, documents, sections)]
    for name, section in sections.items():
        body = section.body.strip()
        for figure, (_, text) in section.figures.items():
            image = Path(figures, f"{name}-{figure}.png").as_posix()
            body = body.replace(f"{{{figure}}}", f"![{text}]({image})")
        parts.append(f"## {studies[name].title}\n\n{_origin(documents[name])}\n\n{body}")
    page.parent.mkdir(parents=True, exist_ok=True)
    partial = page.with_name(f".{page.name}.partial")
    partial.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    partial.replace(page)
    return [
        f"{claim.verdict:<20} {claim.statement}"
        for section in sections.values()
        for claim in section.claims
    ]


def differing_verdicts(
    studies: dict[str, Study], ours: Path, theirs: Path
) -> tuple[int, list[str]]:
    """Where two folders of results come to different verdicts, in the studies that both have.

    Returns:
        How many claims both have, and a line for each whose verdicts differ.

    Raises:
        InputError: they have no claim in common, or one holds no results or damaged ones.
    """
    found = [
        {
            (name, claim.statement): claim.verdict
            for name, document in load_documents(studies, folder).items()
            for claim in _section(studies[name], document).claims
        }
        for folder in (ours, theirs)
    ]
    both = [key for key in found[0] if key in found[1]]
    if not both:
        raise InputError(f"{ours} and {theirs} have no claim in common")
    here, there = found
    lines = [
        f"{name}: {statement}: {here[name, statement]}, there {there[name, statement]}"
        for name, statement in both
        if here[name, statement] != there[name, statement]
    ]
    return len(both), lines


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


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


def _draw(sections: dict[str, Section], out: Path) -> None:
    for name, section in sections.items():
        for figure, (drawn, _) in section.figures.items():
            drawn.savefig(out / f"{name}-{figure}.png", dpi=130, metadata={"Software": None})


def _head(
    studies: dict[str, Study], documents: dict[str, dict[str, Any]], sections: dict[str, Section]
) -> str:
    rows = [
        [claim.statement, claim.measured, f"**{claim.verdict}**", f"`{name}`"]
        for name, section in sections.items()
        for claim in section.claims
    ]
    missing = [name for name in studies if name not in documents]
    commands = "\n".join(dict.fromkeys(_command(found) for found in documents.values()))
    lines = [
        "# Results",
        "What the paper claims, what we measured for it, and whether it held. This page is written by "
        "`python -m studies` from the records beside its figures; a verdict follows from them by a rule, "
        "and another run may get another one. Intervals are 95 % by Student's t over seeds; a difference "
        "is taken seed by seed.",
        f"```sh\n{commands}\n```",
        table(["claim", "measured", "verdict", "study"], rows),
    ]
    if missing:
        lines.append(f"Not run here: {', '.join(missing)}.")
    return "\n\n".join(lines)


def _origin(document: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {document['versions'][name]}" for name in VERSIONS)
    seeds = f"{document['seeds']} seed" + "s" * (document["seeds"] > 1)
    return (
        f"<sub>{document['date']}, {document['hardware']}, {document['workers']} at a time; {versions}; "
        f"scale {document['scale']}, {seeds}; {document['job_seconds'] / 60:.0f} minutes of jobs; "
        f"`{_command(document)}`</sub>"
    )


def _command(document: dict[str, Any]) -> str:
    """As it is given today; records of before the studies left the package have its old name."""
    return document["command"].replace("stablemask reproduce", "python -m studies", 1)
