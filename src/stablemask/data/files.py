"""Files of text and of records, plain or compressed, read as streams."""

from __future__ import annotations

import csv
import gzip
import io
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from stablemask.data.conversations import is_conversation
from stablemask.errors import InputError
from stablemask.reading import first_line, parse_json, reading

_COMPRESSED = (".gz", ".zst")
_TEXT = (".txt", ".md")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_RECORDS = (".jsonl", ".json", *_DELIMITERS)
_PARQUET = ".parquet"
EXTENSIONS = (
    f"{', '.join((*_TEXT, *_RECORDS[:-1]))} and {_RECORDS[-1]}, each also with .gz or .zst, "
    f"and {_PARQUET}"
)

# What Datasets writes beside its data.
_METADATA = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}

PARQUET_ROWS = 1000  # held at a time


class Record(NamedTuple):
    fields: dict[str, Any]
    where: str
    position: int = 0  # bytes of its file that were read for it and what is before it
    split: Literal["train", "validation"] | None = None  # where the source decides it itself


def is_text(path: Path) -> bool:
    return _kind(path) in _TEXT


def is_records(path: Path) -> bool:
    is_known = _kind(path) in _RECORDS or path.suffix.lower() == _PARQUET
    return is_known and path.name not in _METADATA


def _kind(path: Path) -> str:
    """The extension, of a compressed file that of its content."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _COMPRESSED else suffix


def walk(root: Path, skip: Iterable[str] = ()) -> list[Path]:
    """Files below ``root`` by relative name, less hidden ones and the folders named in ``skip``.

    A link to a folder is listed as a file is, and not followed.

    Raises:
        InputError: a folder cannot be read.
    """
    paths = []

    def fail(error: OSError) -> None:
        raise InputError(f"cannot read '{error.filename}': {error.strerror}") from error

    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = [name for name in subfolders if name not in skip and name[0] != "."]
        links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
        paths += [Path(folder, name) for name in [*names, *links] if name[0] != "."]
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def select(root: Path, is_wanted: Callable[[Path], bool]) -> list[Path]:
    """The wanted files below ``root``; a warning counts the others by their extension."""
    wanted: list[Path] = []
    kinds: Counter[str] = Counter()
    for path in walk(root):
        if path.is_dir():
            kinds["link to a folder"] += 1
        elif is_wanted(path):
            wanted.append(path)
        else:
            compressed = path.suffix.lower() in _COMPRESSED
            kinds["".join(path.suffixes[-1 - compressed :]).lower() or "without extension"] += 1
    if wanted and kinds:
        total = sum(kinds.values())
        first = kinds.most_common(8)
        counts = [f"{count} {kind}" for kind, count in first]
        others = total - sum(count for _, count in first)
        counts += [f"{others} of other kinds"] * bool(others)
        warnings.warn(
            f"of {len(wanted) + total} files in '{root}', {len(wanted)} are read; "
            f"not read: {', '.join(counts)}",
            stacklevel=2,
        )
    return wanted


def read_text(path: Path) -> str:
    """All of a file of text.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    with reading(path), path.open("rb") as file:
        data = _decompressed(file, path).read()
    if b"\0" in data:
        raise InputError(f"'{path}' is a binary file; text in UTF-8 is wanted")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is not UTF-8 text: {error.reason} at {error.start}") from error


def read_records_of(path: Path, column: str | None = None) -> Iterator[Record]:
    """The records of a file one after another, each with its ``column`` at least, or with all.

    Raises:
        InputError: it cannot be read, or has no such column.
    """
    kind = _kind(path)
    read = {".jsonl": _json_lines, ".json": _json, _PARQUET: _parquet}.get(kind, _delimited)
    with reading(path):
        yield from read(path, column)


def check_column(column: str, columns: Iterable[str], where: str, hint: str = "") -> None:
    if column in columns:
        return
    there = sorted(str(name)[:40] for name in columns if name is not None)
    more = f" and {len(there) - 20} more" if len(there) > 20 else ""
    message = f"{where}: no column {column!r}; the columns are: {', '.join(there[:20]) or 'none'}"
    if is_conversation(columns):
        hint = "these are conversations, on which `stablemask finetune` trains"
    raise InputError(message + more + (hint and f"; {hint}"))


def _decompressed(file: IO[bytes], path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(file)  # type: ignore[return-value]
    if suffix == ".zst":
        import pyarrow as pa

        # Not of the zstandard package, which takes a truncated file for a whole one.
        return io.BufferedReader(pa.CompressedInputStream(file, "zstd"))
    return file


def _json_lines(path: Path, column: str | None) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(_decompressed(file, path), start=1):
            if not line.strip():
                continue
            where = f"'{path}', line {number}"
            try:
                record = parse_json(line)
            except ValueError as error:  # also what is not UTF-8
                raise InputError(f"{where}: not a JSON record: {error}") from error
            yield Record(_checked(record, column, where), where, file.tell())


def _json(path: Path, column: str | None) -> Iterator[Record]:
    """Records in an array, which is held whole, one record, or a record a line."""
    with path.open("rb") as file:
        data = _decompressed(file, path)
        first = next((line for line in data if line.strip()), b"")
        if not first:
            return
        try:
            by_line = isinstance(parse_json(first), dict)
        except ValueError:
            by_line = False
        content = b"" if by_line else first + data.read()
    if by_line:
        yield from _json_lines(path, column)
        return
    try:
        records = parse_json(content)
    except ValueError as error:
        raise InputError(f"'{path}' is neither an array nor lines of JSON: {error}") from error
    records = records if isinstance(records, list) else [records]
    bytes_per_record = path.stat().st_size / max(len(records), 1)
    for number, record in enumerate(records, start=1):
        where = f"'{path}', record {number}"
        yield Record(_checked(record, column, where), where, int(number * bytes_per_record))


def _checked(record: Any, column: str | None, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise InputError(f"{where}: a JSON object is wanted, not {type(record).__name__}")
    if column is not None:
        check_column(column, record, where)
    return record


def _delimited(path: Path, column: str | None) -> Iterator[Record]:
    """Records below a line of column names, in UTF-8; of CSV's quotes nothing is guessed."""
    csv.field_size_limit(sys.maxsize)  # a document is a field
    delimiter = _DELIMITERS[_kind(path)]
    with (
        path.open("rb") as file,
        io.TextIOWrapper(_decompressed(file, path), "utf-8-sig", newline="") as lines,
    ):
        rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            columns = rows.fieldnames or []
            if column is not None and columns:
                check_column(column, columns, f"'{path}'")
            for record in rows:
                where = f"'{path}', line {rows.line_num}"
                if None in record or None in record.values():
                    raise InputError(f"{where}: not as many fields as the {len(columns)} columns")
                yield Record(record, where, file.tell())
        except csv.Error as error:
            raise InputError(f"'{path}', line {rows.reader.line_num}: {error}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"'{path}' is not UTF-8 text: {error.reason}") from error


def _parquet(path: Path, column: str | None) -> Iterator[Record]:
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
                yield Record(row, f"'{path}', row {number}", int(number * bytes_per_row))
    except InputError:
        raise
    # A value that Python cannot hold is one of the last two: text that is not UTF-8, a year of 10,000.
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise InputError(f"'{path}' is not a readable Parquet file: {first_line(error)}") from error
