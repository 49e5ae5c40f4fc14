"""Progress bars: on a terminal and in a notebook, and nowhere else."""

import sys
from typing import Any

from tqdm.auto import tqdm


def bars_are_seen() -> bool:
    """Whether stderr is a terminal, or tqdm has found a notebook that shows its bars."""
    of_notebook = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
    return of_notebook or sys.stderr.isatty()


def progress_bar(*args: Any, show: bool = True, **options: Any) -> tqdm:
    """tqdm's bar, with its arguments; none where ``show`` is false or nobody would see it."""
    make: Any = tqdm  # whose arguments are its own affair
    return make(*args, disable=not (show and bars_are_seen()), **options)
