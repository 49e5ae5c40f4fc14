"""What a study is made of: jobs that measure, and a section that says what came of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALES = ("small", "gpu")
SOURCE = "builtin"

Record = dict[str, Any]
Verdict = Literal["reproduced", "partly reproduced", "not reproduced", "open"]


@dataclass(frozen=True)
class Job:
    """One piece of work, done in a process of its own, whose record is stored when it is done.

    Attributes:
        name: unique in its study, fit for a file name.
        run: a function of a module, called as ``run(work, **arguments)`` with the folder that all jobs
            share; returns JSON, for a record of ``arguments`` and this.
        arguments: JSON; a job whose arguments have changed is done anew.
        cost: about how many seconds it takes on one core, for the time left.
    """

    name: str
    run: Callable[..., Mapping[str, Any]]
    arguments: Mapping[str, Any]
    cost: float = 1.0


def verdict(holds: Sequence[bool | None]) -> Verdict:
    """Of a claim that holds in every case, in some, or in none; None is a case that cannot be told."""
    if holds and all(holds):
        return "reproduced"
    if any(holds):
        return "partly reproduced"
    return "not reproduced" if False in holds else "open"


@dataclass(frozen=True)
class Claim:
    """A claim of the paper or a question of ours, and what was found.

    Attributes:
        statement: one sentence.
        measured: Markdown in one line, with the figures that decide.
        verdict: worked out from the records by a rule that the section states.
    """

    statement: str
    measured: str
    verdict: Verdict


@dataclass(frozen=True)
class Section:
    """What the page says of a study.

    Attributes:
        claims: they also stand in the summary at the page's head.
        body: Markdown; ``{name}`` in a line of its own stands for the figure of that name.
        figures: by name, each with the text that stands for it where it cannot be seen.
    """

    claims: list[Claim]
    body: str
    figures: dict[str, tuple[Figure, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A study by name.

    Attributes:
        jobs: from the scale and the number of seeds, in the order they begin.
        section: from the records of all jobs, in their order.
    """

    name: str
    title: str
    jobs: Callable[[str, int], list[Job]]
    section: Callable[[list[Record]], Section]
