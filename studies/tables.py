"""Markdown tables of the kinds of attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from benchmarks.tables import table

from .kinds import KINDS, LABELS

T = TypeVar("T")


def kinds_table(
    corner: str,
    columns: Sequence[T],
    cell: Callable[[str, T], str],
    name: Callable[[T], str] = str,
) -> str:
    """A row for each kind of attention that has a cell; ``corner`` says what the cells are."""
    rows = [[LABELS[kind], *(cell(kind, column) for column in columns)] for kind in KINDS]
    return table([corner, *map(name, columns)], [row for row in rows if any(row[1:])])


def joined(tables: Iterable[str]) -> str:
    return "\n\n".join(tables)
