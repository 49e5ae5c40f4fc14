"""The paper's claims, measured: studies that train and look into models, and a page that sums them up."""

import os
import shlex
import signal
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from stablemask.data.sources import open_source
from stablemask.errors import InputError
from stablemask.options import check_least, command_words, option
from stablemask.writing import only_writer

from . import (
    ablation,
    cost,
    extrapolation,
    language,
    language_section,
    long_training,
    position,
    position_section,
    sinks,
    sinks_section,
    theory,
)
from .page import load_documents, text_of, verdicts, write_page
from .runner import KEPT, Stopped, run_studies
from .study import SCALES, Study

PAGE = "page"
# These take many hours.
ALONE = ("ablation", "long")
# In the order they are run and told.
STUDIES = {
    name: Study(name, title, measured.jobs, told.section, text_of(name), name in ALONE)
    for name, title, measured, told in (
        ("theory", "Theory", theory, theory),
        ("position", "Absolute position", position, position_section),
        ("language", "Language modelling", language, language_section),
        ("extrapolation", "Past the training length", extrapolation, extrapolation),
        ("sinks", "Attention sinks", sinks, sinks_section),
        ("cost", "Cost", cost, cost),
        ("ablation", "What the mass should be, and its rivals", ablation, ablation),
        ("long", "To the end of the lead", long_training, long_training),
    )
}


@dataclass(kw_only=True)
class StudyOptions:
    names: list[str] = option(
        [],
        "which studies, or page for the page alone; by default the page and all but ablation and long, "
        "which take many hours",
        choices=(*STUDIES, PAGE),
        positional=True,
    )
    scale: str = option(
        "small", "small for two cores and some 2.5 hours, gpu for a large one", choices=SCALES
    )
    out: str = option("runs/reproduce", "folder for the results and the work")
    records: str = option(
        str(KEPT),
        "folder where ablation and long keep the record of each training, and find it again",
    )
    page: str | None = option(None, "Markdown file to write; by default results.md in --out")
    text: str | None = option(
        None, "one more source to model: a file or folder of text, or hub:OWNER/NAME[:CONFIG]"
    )
    against: str | None = option(
        None, "folder of other results, say another machine's: tell which verdicts differ"
    )
    seeds: int = option(3, "seeds of every comparison")
    workers: int | None = option(None, "jobs at a time; by default one a core, or one on a GPU")
    resume: bool = option(False, "go on with what is in --out; what is done is used again")


def run(options: StudyOptions) -> int:
    out = Path(options.out)
    _check(options, out)
    asked = options.names or [name for name in STUDIES if name not in ALONE]
    names = [name for name in STUDIES if name in asked]
    workers = options.workers or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    try:
        with only_writer(out):
            run_studies(
                [_study(name, options) for name in names],
                scale=options.scale,
                seeds=options.seeds,
                workers=workers,
                out=out,
                command=_command(options),
                kept=Path(options.records),
            )
    except Stopped as stop:
        here = _command(options).replace("python", shlex.quote(sys.executable), 1)
        print(f"stopped; go on with: {here} --resume")
        return 130 if stop.signal is signal.SIGINT else 0
    page = Path(options.page) if options.page else out / "results.md"
    for line in write_page(STUDIES, out, page):
        print(line)
    print(f"\npage     {page}")
    return 0 if options.against is None else _compare(out, Path(options.against))


def _compare(out: Path, other: Path) -> int:
    here, there = (verdicts(STUDIES, folder) for folder in (out, other))
    both = [key for key in here if key in there]
    if not both:
        raise InputError(f"{out} and {other} have no claim in common")
    differing = [key for key in both if here[key] != there[key]]
    for name, statement in differing:
        found = here[name, statement], there[name, statement]
        print(f"differs  {name}: {statement}: {found[0]}, there {found[1]}")
    print(f"verdicts {len(both) - len(differing)} of {len(both)} as in {other}")
    return 1 if differing else 0


def _study(name: str, options: StudyOptions) -> Study:
    study = STUDIES[name]
    if name == "language":
        return replace(study, jobs=partial(language.jobs, text=options.text))
    return study


def _check(options: StudyOptions, out: Path) -> None:
    if options.text is not None:
        open_source(options.text)
    check_least(options, seeds=1, workers=1)
    if options.against is not None:  # before hours of work
        load_documents(STUDIES, Path(options.against))
    if out.exists() and not out.is_dir():
        raise InputError(f"out must be a folder, {out} is a file")
    only_page = options.names == [PAGE]
    begun = out.exists() and any(out.iterdir())
    if only_page and not begun:
        raise InputError(f"{out} holds no results; run the studies first")
    if begun and not options.resume and not only_page:
        raise InputError(f"{out} is not empty; add --resume to go on, or name another --out")


def _command(options: StudyOptions) -> str:
    """The command with these options, defaults left out."""
    words = command_words(options, without=("resume", "page", "against", "records"))
    return shlex.join(["python", "-m", "studies", *words])
