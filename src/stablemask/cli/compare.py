"""Runs of `stablemask pretrain` side by side: losses, perplexity by length, attention sinks; as a page with --out."""

import shlex
from contextlib import nullcontext

from stablemask.cli.options import CompareOptions
from stablemask.cli.page import labels, where_it_is
from stablemask.errors import InputError
from stablemask.options import command_words
from stablemask.reading import user_path
from stablemask.report.comparison import compare
from stablemask.report.comparison_page import render_comparison
from stablemask.report.summary import caveat, takeaway, text_table, what_differs
from stablemask.writing import whole_file


def run(options: CompareOptions) -> None:
    folders = [user_path(run) for run in options.runs]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError("a run is given twice; name runs that differ")
    if options.prompt is not None and options.out is None:
        raise InputError("--prompt goes with --out, whose page has the samples")
    with whole_file(options.out) if options.out else nullcontext() as partial:
        comparison = compare(
            dict(zip(labels(options.runs), folders, strict=True)),
            max_tokens=options.max_tokens,
            prompt=options.prompt,
            command=shlex.join(["stablemask", "compare", *command_words(options)]),
        )
        if partial is not None:
            partial.write_text(render_comparison(comparison), encoding="utf-8")
    print(
        f"{text_table(comparison)}\n\n{takeaway(comparison)}\n{caveat(comparison)}\n{what_differs(comparison)}"
    )
    if options.out is not None:
        print(f"\n{where_it_is(options.out)}")
