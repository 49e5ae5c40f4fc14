"""Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from .kinds import KINDS, LABELS

T = TypeVar("T")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def kinds_table(
    corner: str,
    columns: Sequence[T],
    cell: Callable[[str, T], str],
    name: Callable[[T], str] = str,
) -> str:
    """A row for each kind of attention that has a cell; ``corner`` says what the cells are."""
    rows = [[LABELS[kind], *(cell(kind, column) for column in columns)] for kind in KINDS]
    return table([corner, *map(name, columns)], [row for row in rows if any(row[1:])])


def records_table(records: Iterable[Mapping[str, Any]], columns: Sequence[tuple[str, str]]) -> str:
    """A row for each record; a column is a head and a format of the record's fields."""
    shown = [{k: _Nothing() if v is None else v for k, v in record.items()} for record in records]
    rows = [[text.format_map(record) for _, text in columns] for record in shown]
    return table([head for head, _ in columns], rows)


class _Nothing:
    def __format__(self, spec: str) -> str:
        return ""


def joined(tables: Iterable[str]) -> str:
    return "\n\n".join(tables)
