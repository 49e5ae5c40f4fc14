"""Runs of `stablemask pretrain` side by side: losses, perplexity by length, attention sinks; as a page with --out."""

import shlex
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from stablemask.cli.page import labels, where_it_is, whole_file
from stablemask.errors import InputError
from stablemask.options import option
from stablemask.report.comparison import compare
from stablemask.report.comparison_page import render_comparison
from stablemask.report.summary import caveat, takeaway, text_table, what_differs

SUMMARY = "runs of your own, side by side"


@dataclass(kw_only=True)
class CompareOptions:
    runs: list[str] = option(
        [],
        "folders of runs of one preset, context and text; the others are compared with the first",
        positional=True,
    )
    out: Path | None = option(None, "HTML file to write, with figures and a sample of each run")
    max_tokens: int = option(2**17, "read so many validation tokens of a run at most")
    prompt: str | None = option(
        None, "what the samples go on with; by default the validation text's beginning"
    )


def run(options: CompareOptions) -> None:
    folders = [Path(run).expanduser() for run in options.runs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("a run is given twice; name runs that differ")
    with whole_file(options.out) if options.out else nullcontext() as page:
        comparison = compare(
            dict(zip(labels(options.runs), folders, strict=True)),
            max_tokens=options.max_tokens,
            prompt=options.prompt,
            command=_command(options),
        )
        if page is not None:
            page.write_text(render_comparison(comparison), encoding="utf-8")
    print(
        f"{text_table(comparison)}\n\n{takeaway(comparison)}\n{caveat(comparison)}\n{what_differs(comparison)}"
    )
    if options.out is not None:
        print(f"\n{where_it_is(options.out)}")


def _command(options: CompareOptions) -> str:
    out = [] if options.out is None else ["--out", str(options.out)]
    return shlex.join(["stablemask", "compare", *options.runs, *out])
