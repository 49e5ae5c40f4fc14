"""Train a small model with softmax and one with StableMask, and write a report that compares them."""

import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from transformers.utils import logging as transformers_logging

from stablemask.cli.options import DemoOptions
from stablemask.cli.page import where_it_is
from stablemask.errors import InputError
from stablemask.options import command_words
from stablemask.report.comparison import compare
from stablemask.report.comparison_page import render_comparison
from stablemask.report.summary import caveat, takeaway, text_table
from stablemask.shell import runnable
from stablemask.training.pretrain import OPTIONS_FILE, pretrain
from stablemask.training.pretrain_options import PretrainOptions
from stablemask.writing import write_whole

KINDS = ("softmax", "stablemask")
RESULTS, REPORT = "results.json", "report.html"


def run(options: DemoOptions) -> int:
    out = options.out
    trainings = {kind: _training(options, kind) for kind in KINDS}
    _check_out(out, options.resume)
    transformers_logging.disable_progress_bar()  # ours say more
    with _advice_when_interrupted(options):
        for number, (kind, training) in enumerate(trainings.items(), 1):
            print(
                f"[{number}/3] training {training.preset} with {kind} attention, "
                f"{options.steps} steps",
                flush=True,
            )
            result = pretrain(training)
            if result.stopped_by is signal.SIGINT:
                raise KeyboardInterrupt
            if result.stopped_by is not None:
                print(f"stopped; go on with: {runnable(_command(options, resume=True))}")
                return 0
        print("[3/3] comparing", flush=True)
        comparison = compare(
            {kind: out / kind for kind in KINDS},
            prompt="def " if options.data == "builtin" else None,
            command=_command(options),
        )
        write_whole(out / RESULTS, comparison.to_json())
        write_whole(out / REPORT, render_comparison(comparison))
    print(f"\n{text_table(comparison)}\n\n{takeaway(comparison)}\n{caveat(comparison)}\n")
    print(_what_next(options))
    return 0


def _training(options: DemoOptions, kind: str) -> PretrainOptions:
    """The run of one attention kind, its options checked."""
    folder = options.out / kind
    training = PretrainOptions(
        steps=options.steps,
        out=str(folder),
        data=options.data,
        attention=kind,
        batch_size=8,  # more steps for the same tokens: softmax is slow to get going
        eval_tokens=16384,
        resume=options.resume and (folder / OPTIONS_FILE).exists(),
    )
    training.resolved()
    return training


def _check_out(out: Path, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"out must be a folder, {out} is a file")
    begun = any((out / kind / OPTIONS_FILE).exists() for kind in KINDS)
    if begun and not resume:
        raise InputError(f"{out} already holds a demo; add --resume, or name another --out")
    if resume and not out.exists():
        raise InputError(f"{out} holds no demo to resume; leave out --resume to start one")
    # One that was killed before its first training had begun left nothing but what is hidden.
    files = (path.relative_to(out).parts for path in out.rglob("*") if path.is_file())
    if not begun and any(not any(part.startswith(".") for part in parts) for parts in files):
        raise InputError(f"{out} is not empty and holds no demo; name another --out")


@contextmanager
def _advice_when_interrupted(options: DemoOptions) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        begun = any((options.out / kind / OPTIONS_FILE).exists() for kind in KINDS)
        print(f"\nstopped; go on with: {runnable(_command(options, resume=begun))}", flush=True)
        raise


def _command(options: DemoOptions, *, resume: bool = False) -> str:
    words = command_words(replace(options, resume=resume))
    return shlex.join(["stablemask", "demo", *words])


def _what_next(options: DemoOptions) -> str:
    out = options.out
    model = shlex.quote(str(out / "stablemask"))
    command = runnable("stablemask")
    return f"""{where_it_is(out / REPORT)}
numbers  {out / RESULTS}

Try next:
  {command} generate --model {model} --prompt "def " --temperature 0.8 --stream
  {command} evaluate --model {model} --lengths 1x 2x 4x 8x
  {command} pretrain --attention stablemask --steps 2000 --out runs/longer"""
