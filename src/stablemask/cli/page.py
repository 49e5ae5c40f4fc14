"""What the commands that write a page have in common: its labels, where it is."""

from collections.abc import Sequence
from pathlib import Path


def labels(names: Sequence[str]) -> list[str]:
    """The last part of each name, where these differ."""
    short = [Path(name).name or name for name in names]
    return short if len(set(short)) == len(short) else list(names)


def where_it_is(path: Path) -> str:
    return f"report   {path}\n         open it in a browser: {path.resolve().as_uri()}"
