"""What a study is made of: jobs that measure, and a section that is filled with what came of them."""

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
        after: names of jobs before it in its study, whose records it is given as ``before``.
    """

    name: str
    run: Callable[..., Mapping[str, Any]]
    arguments: Mapping[str, Any]
    cost: float = 1.0
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """A claim of the paper or a question of ours, and in which cases it holds.

    Attributes:
        statement: one sentence.
        holds: in each case, by the rule that stands in the study's text; None where that cannot be told.
    """

    statement: str
    holds: Sequence[bool | None]

    @property
    def verdict(self) -> Verdict:
        if self.holds and all(self.holds):
            return "reproduced"
        if any(self.holds):
            return "partly reproduced"
        return "not reproduced" if False in self.holds else "open"


@dataclass(frozen=True)
class Section:
    """What a study's text is filled with.

    Attributes:
        claims: of the summary at the page's head.
        tables: Markdown by name, empty where nothing was measured.
        figures: by name.
        facts: what else the text names, such as the numbers in a rule.
    """

    claims: list[Claim]
    tables: dict[str, str]
    figures: dict[str, Figure] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """A study by name.

    Attributes:
        jobs: from the scale and the number of seeds, in the order they begin.
        section: from the records of all jobs, in their order; of those that are done, where it stands alone.
        text: what a person has written, a Jinja template that names tables, figures and facts.
        alone: it takes so long that it is run only where it is named, and told as far as it is done; the
            record of each of its jobs is kept for good, beside those that others have made.
    """

    name: str
    title: str
    jobs: Callable[[str, int], list[Job]]
    section: Callable[[list[Record]], Section]
    text: str
    alone: bool = False
