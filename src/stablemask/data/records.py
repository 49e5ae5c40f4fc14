"""Whole records, for data that is more than text: of files of records, and datasets of the hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from stablemask.reading import user_path

from .files import is_records, read_rows, select, walk
from .sources import BUILTIN, HUB_PREFIX, dataset_splits


class Record(NamedTuple):
    fields: dict[str, Any]
    where: str
    split: str | None = None  # where the source decides it itself


def first_record(source: str) -> Record | None:
    """The first record of a source; None where it is ``builtin``, text alone, or not there."""
    if source.startswith(HUB_PREFIX):
        return next(_dataset_records(source), None)
    if source in ("", BUILTIN):
        return None
    path = user_path(source)
    files = filter(is_records, walk(path) if path.is_dir() else [path])
    return next(
        (record for file in files if file.is_file() for record in _file_records(file)), None
    )


def read_records(source: str) -> Iterator[Record]:
    """The records of a file, a folder or a dataset, one after another.

    A warning counts the other files of a folder, those of text among them.

    Raises:
        InputError: something cannot be read, or is no record.
    """
    if source.startswith(HUB_PREFIX):
        yield from _dataset_records(source)
        return
    path = user_path(source)
    for file in select(path, is_records) if path.is_dir() else [path]:
        yield from _file_records(file)


def _file_records(file: Path) -> Iterator[Record]:
    yield from (Record(row.fields, row.where) for row in read_rows(file))


def _dataset_records(source: str) -> Iterator[Record]:
    splits = dataset_splits(source)
    for split, rows in splits.items():
        for number, row in enumerate(rows, start=1):
            where = f"{source!r}, {split} row {number}"
            yield Record(row, where, split if len(splits) > 1 else None)
