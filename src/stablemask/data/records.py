"""Whole records, for data that is more than text: of JSON lines, Parquet, and datasets of the hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .files import is_records, is_text, read_rows, walk
from .sources import HUB_PREFIX, dataset_splits


class Record(NamedTuple):
    fields: dict[str, Any]
    where: str
    split: str | None = None  # where the source decides it itself


def record_files(source: str) -> list[Path]:
    """The files of records at a path; none where there is plain text too, or nothing."""
    path = Path(source).expanduser()
    files = walk(path) if source and path.is_dir() else [path]
    if any(is_text(file) for file in files):
        return []
    return [file for file in files if file.is_file() and is_records(file)]


def read_records(source: str) -> Iterator[Record]:
    """The records of a file, a folder or a dataset, one after another.

    Raises:
        InputError: something cannot be read, or is no record.
    """
    if source.startswith(HUB_PREFIX):
        yield from _dataset_records(source)
        return
    for file in record_files(source):
        yield from (Record(row.fields, row.where) for row in read_rows(file))


def _dataset_records(source: str) -> Iterator[Record]:
    splits = dataset_splits(source)
    for split, rows in splits.items():
        for number, row in enumerate(rows, start=1):
            where = f"{source!r}, {split} row {number}"
            yield Record(row, where, split if len(splits) > 1 else None)
