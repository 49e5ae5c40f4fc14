"""Whole records, for data that is more than text: of JSON lines, Parquet, and datasets of the hub."""

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from stablemask.errors import InputError

from .sources import HUB_PREFIX, first_line, json_lines, load_dataset_splits, walk

_RECORDS = re.compile(r"\.(jsonl|jsonl\.gz|parquet)$")


class Record(NamedTuple):
    fields: dict[str, Any]
    where: str
    split: str | None = None  # where the source decides it itself


def record_files(source: str) -> list[Path]:
    """The files of records at a path; none where there is plain text too, or nothing."""
    path = Path(source).expanduser()
    files = walk(path) if source and path.is_dir() else [path]
    if any(file.name.lower().endswith(".txt") for file in files):
        return []
    return [file for file in files if file.is_file() and _RECORDS.search(file.name.lower())]


def read_records(source: str) -> Iterator[Record]:
    """The records of a file, a folder or a dataset, one after another.

    Raises:
        InputError: something cannot be read, or is no record.
    """
    if source.startswith(HUB_PREFIX):
        yield from _dataset_records(source)
        return
    for file in record_files(source):
        try:
            if file.suffix.lower() == ".parquet":
                yield from _parquet(file)
            else:
                yield from (Record(fields, where) for fields, where in json_lines(file))
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"cannot read '{file}': {first_line(error)}") from error


def _parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield Record(row, f"'{path}', row {number}")
    except pa.ArrowException as error:
        raise InputError(f"'{path}' is not a readable Parquet file: {first_line(error)}") from error


def _dataset_records(source: str) -> Iterator[Record]:
    name, _, config = source.removeprefix(HUB_PREFIX).partition(":")
    splits = load_dataset_splits(source, name, config or None)
    if "train" not in splits:
        raise InputError(f"{source!r} has no 'train' split; it has: {', '.join(splits)}")
    given = "validation" in splits
    for split in ("train", "validation") if given else ("train",):
        for number, row in enumerate(splits[split], start=1):
            yield Record(row, f"{source!r}, {split} row {number}", split if given else None)
