"""Processes forked from one that has imported what they need, which takes seconds of each otherwise."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "torch.distributed.tensor",
        "stablemask.cli.finetune",
        "stablemask.cli.pretrain",
        "tests.oracle",
    ]
)


def start(
    function: Callable[..., Any], *args: Any, output: Path | None = None, **environment: str
) -> Any:
    """Call a module-level function in a process of its own; a number that it returns is the exit code.

    Args:
        output: where its stdout goes, and stderr beside it, with ``.err``.
        environment: variables that differ from this process's.
    """
    variables = {**os.environ, **environment}
    process = context.Process(target=_run, args=(function, args, output, variables))
    process.start()
    return process


def _run(
    function: Callable[..., Any], args: tuple, output: Path | None, variables: dict[str, str]
) -> None:
    os.environ.update(variables)
    if output is not None:
        for descriptor, path in ((1, output), (2, output.with_suffix(".err"))):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    code = function(*args)
    sys.exit(code if isinstance(code, int) else 0)
