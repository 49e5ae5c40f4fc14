"""Files of text and of records, plain or compressed, read as streams."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from stablemask.errors import InputError

_TEXT = (".txt", ".txt.gz", ".txt.zst")
_JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_PARQUET = (".parquet",)
EXTENSIONS = ".txt and .jsonl, each also with .gz or .zst, and .parquet"

PARQUET_ROWS = 1000  # held at a time


class Row(NamedTuple):
    """A record of a file."""

    fields: dict[str, Any]
    where: str
    position: int  # bytes of the file that were read for it and what is before it


def is_text(path: Path) -> bool:
    return path.name.lower().endswith(_TEXT)


def is_records(path: Path) -> bool:
    return path.name.lower().endswith(_JSON_LINES + _PARQUET)


def walk(root: Path, skip: Iterable[str] = ()) -> list[Path]:
    """Files below ``root`` by relative name, less hidden ones and the folders named in ``skip``."""
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skip and name[0] != "."]
        paths += [Path(folder, name) for name in names if name[0] != "."]
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def read_text(path: Path) -> str:
    """All of a file of text.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    with _reading(path), path.open("rb") as file:
        data = _decompressed(file, path).read()
    if b"\0" in data:
        raise InputError(f"'{path}' is a binary file; text in UTF-8 is wanted")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is not UTF-8 text: {error.reason} at {error.start}") from error


def read_rows(path: Path, column: str | None = None) -> Iterator[Row]:
    """The records of a file one after another, each with its ``column`` at least, or with all.

    Raises:
        InputError: it cannot be read, or has no such column.
    """
    with _reading(path):
        yield from (_parquet if path.suffix.lower() in _PARQUET else _json_lines)(path, column)


def check_column(column: str, columns: Iterable[str], where: str) -> None:
    if column not in columns:
        there = ", ".join(sorted(columns)) or "none"
        raise InputError(f"{where}: no column {column!r}; the columns are: {there}")


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"cannot read '{path}': {reason}") from error


def _decompressed(file: IO[bytes], path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(file)  # type: ignore[return-value]
    if suffix == ".zst":
        import io

        import pyarrow as pa

        # Not of the zstandard package, which takes a truncated file for a whole one.
        return io.BufferedReader(pa.CompressedInputStream(file, "zstd"))
    return file


def _json_lines(path: Path, column: str | None) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(_decompressed(file, path), start=1):
            if not line.strip():
                continue
            where = f"'{path}', line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:  # also what is not UTF-8
                raise InputError(f"{where}: not a JSON record: {error}") from error
            if not isinstance(record, dict):
                raise InputError(f"{where}: a JSON object is wanted, not {type(record).__name__}")
            if column is not None:
                check_column(column, record, where)
            yield Row(record, where, file.tell())


def _parquet(path: Path, column: str | None) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if column is not None:
                check_column(column, file.schema_arrow.names, f"'{path}'")
            bytes_per_row = path.stat().st_size / max(file.metadata.num_rows, 1)
            columns = None if column is None else [column]
            batches = file.iter_batches(PARQUET_ROWS, columns=columns)
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield Row(row, f"'{path}', row {number}", int(number * bytes_per_row))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"'{path}' is not a readable Parquet file: {first_line(error)}") from error
