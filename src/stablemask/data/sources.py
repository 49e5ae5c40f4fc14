"""Where documents come from, and which of them are held out for validation.

A *source* is ``builtin``, a file or folder of text, JSON lines or Parquet, or ``hub:OWNER/NAME``.
Its unit is the *document*: a ``.txt`` or ``.py`` file, or one record of anything else. Documents
without text are left out.

How a source is split:

- A Hub dataset with a ``validation`` split of its own keeps it.
- Any other document falls to validation when a hash falls below ``validation_fraction``: the hash
  of the file's name relative to the source, or of a record's text. It does not depend on order, the
  machine or the other documents, and a repeated record never stands on both sides.
- A source where that leaves one side empty, such as a single text file, is cut instead: the last
  ``validation_fraction`` of its characters are validation, counted from the start of a line or
  document if one starts there.
"""

import errno
import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from stablemask.data.hub import is_hub_name, require_hub
from stablemask.errors import InputError

BUILTIN = "builtin"
HUB_PREFIX = "hub:"

Split = Literal["train", "validation"]


class Document(NamedTuple):
    text: str
    key: str  # what the split is decided by, where the source does not decide it itself
    split: Split | None = None


def load_documents(
    source: str,
    *,
    split: Literal["train", "validation", "all"] = "all",
    text_column: str = "text",
    validation_fraction: float = 0.05,
) -> list[str]:
    """The documents of ``source``, in an order that is the same on every run.

    Args:
        source: ``"builtin"`` (the source text of the running interpreter's standard library, less
            its tests), the path of a file or folder (searched recursively) of ``.txt``, ``.jsonl``,
            ``.jsonl.gz`` or ``.parquet``, or ``"hub:OWNER/NAME[:CONFIG]"``, where ``OWNER/NAME``
            may also be a local dataset folder. Of a dataset, the ``train`` and ``validation``
            splits are read; other splits stay untouched.
        split: which documents; ``"all"`` is both sides, uncut. See the module for the rule.
        text_column: the field of a record that holds its text.
        validation_fraction: between 0 and 1, the expected share of validation.

    Raises:
        InputError: the source is missing, empty, damaged, not text, or lacks the column.
    """
    if split == "all":
        return [document.text for document in read_documents(source, text_column)]
    if split not in ("train", "validation"):
        raise InputError(f"split {split!r} is not one of 'train', 'validation', 'all'")
    train, validation = split_documents(
        source, text_column=text_column, validation_fraction=validation_fraction
    )
    return train if split == "train" else validation


def split_documents(
    source: str, *, text_column: str = "text", validation_fraction: float = 0.05
) -> tuple[list[str], list[str]]:
    """The training and the validation documents of ``source``; see :func:`load_documents`."""
    check_validation_fraction(validation_fraction)
    train: list[str] = []
    validation: list[str] = []
    for document in read_documents(source, text_column):
        held_out = is_held_out(document, validation_fraction)
        (validation if held_out else train).append(document.text)
    if not train or not validation:
        return cut_documents(train or validation, validation_fraction)
    return train, validation


def read_documents(source: str, text_column: str = "text") -> Iterator[Document]:
    """The documents of ``source`` one after another, in an order that is the same on every run.

    Args:
        source: see :func:`load_documents`, also for ``text_column``.

    Raises:
        InputError: as :func:`load_documents`, where the trouble is met; a source without any text
            says so at its end.
    """
    if source == BUILTIN:
        documents = _read_standard_library()
    elif source.startswith(HUB_PREFIX):
        documents = _read_dataset(source, text_column)
    else:
        documents = _read_path(source, text_column)
    empty = True
    for document in documents:
        if document.text and not document.text.isspace():
            empty = False
            yield document
    if empty:
        raise InputError(f"{source!r} holds no text")


def is_held_out(document: Document, validation_fraction: float) -> bool:
    """Whether ``document`` belongs to validation, by the rule of the module."""
    if document.split is not None:
        return document.split == "validation"
    return uniform_hash(document.key) < validation_fraction


def check_validation_fraction(validation_fraction: float) -> None:
    if not 0 < validation_fraction < 1:
        raise InputError(f"validation fraction {validation_fraction} is not between 0 and 1")


def uniform_hash(key: str) -> float:
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def cut_documents(documents: list[str], validation_fraction: float) -> tuple[list[str], list[str]]:
    """Cut off the end of ``documents``, at the first line that starts inside it."""
    total = sum(map(len, documents))
    remaining = max(1, min(round(total * validation_fraction), total - 1))
    last = len(documents) - 1
    while len(documents[last]) < remaining:
        remaining -= len(documents[last])
        last -= 1
    text = documents[last]
    cut = len(text) - remaining
    if cut > 0 and text[cut - 1] != "\n":
        line_start = text.find("\n", cut) + 1
        if 0 < line_start < len(text):
            cut = line_start
        elif last + 1 < len(documents):  # no line starts there, but a document does
            cut = len(text)
    head, tail = text[:cut], text[cut:]
    train = documents[:last] + [head] * bool(head)
    return train, [tail] * bool(tail) + documents[last + 1 :]


# The standard library

_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def _read_standard_library() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in walk(root, skip=_NOT_LIBRARY):
        if path.suffix == ".py":
            text = path.read_bytes().decode("utf-8", errors="replace")
            yield Document(text, path.relative_to(root).as_posix())


def walk(root: Path, skip: Iterable[str] = ()) -> list[Path]:
    """Files below ``root`` by relative name, less hidden ones and the folders named in ``skip``."""
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in skip and name[0] != "."]
        paths += [Path(folder, name) for name in names if name[0] != "."]
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


# Files


def _read_path(source: str, text_column: str) -> Iterator[Document]:
    path = Path(source).expanduser()
    if not source or not path.exists():
        raise InputError(
            f"no file or folder {source!r}; a source is {BUILTIN!r}, a path, "
            f"or '{HUB_PREFIX}OWNER/NAME[:CONFIG]'"
        )
    if path.is_dir():
        files = [file for file in walk(path) if _extension(file)]
        root, wrong = path, f"no {_EXTENSIONS} file in the folder {source!r}"
    else:
        files = [path] if _extension(path) else []
        root, wrong = path.parent, f"{source!r} is not one of {_EXTENSIONS}"
    if not files:
        raise InputError(wrong)
    for file in files:
        try:
            yield from _READERS[_extension(file)](
                file, file.relative_to(root).as_posix(), text_column
            )
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"cannot read '{file}': {reason}") from error


def _extension(path: Path) -> str:
    """The extension a reader exists for, or an empty string."""
    return next((ending for ending in _READERS if path.name.lower().endswith(ending)), "")


def _read_text(path: Path, name: str, text_column: str) -> Iterator[Document]:
    data = path.read_bytes()
    if b"\0" in data:
        raise InputError(f"'{path}' is a binary file; text in UTF-8 is wanted")
    try:
        yield Document(data.decode("utf-8-sig"), name)
    except UnicodeDecodeError as error:
        raise InputError(f"'{path}' is not UTF-8 text: {error.reason} at {error.start}") from error


def _read_json_lines(path: Path, name: str, text_column: str) -> Iterator[Document]:
    for record, where in json_lines(path):
        _check_column(text_column, record, where)
        yield _record(record[text_column], text_column, where)


def json_lines(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The records of a ``.jsonl`` or ``.jsonl.gz`` file, each with the name of its place."""
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"'{path}', line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:  # also what is not UTF-8
                raise InputError(f"{where}: not a JSON record: {error}") from error
            if not isinstance(record, dict):
                raise InputError(f"{where}: a JSON object is wanted, not {type(record).__name__}")
            yield record, where


def _read_parquet(path: Path, name: str, text_column: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _check_column(text_column, file.schema_arrow.names, f"'{path}'")
            for batch in file.iter_batches(columns=[text_column]):
                for value in batch.column(0).to_pylist():
                    yield _record(value, text_column, f"'{path}'")
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"'{path}' is not a readable Parquet file: {first_line(error)}") from error


_READERS = {
    ".txt": _read_text,
    ".jsonl": _read_json_lines,
    ".jsonl.gz": _read_json_lines,
    ".parquet": _read_parquet,
}
_EXTENSIONS = ", ".join(_READERS)


# Records


def _check_column(text_column: str, columns: Iterable[str], where: str) -> None:
    if text_column not in columns:
        there = ", ".join(sorted(columns)) or "none"
        raise InputError(f"{where}: no column {text_column!r}; the columns are: {there}")


def _record(value: Any, text_column: str, where: str) -> Document:
    if value is None:
        value = ""
    if not isinstance(value, str):
        raise InputError(
            f"{where}: column {text_column!r} holds {type(value).__name__}, text is wanted"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise InputError(f"{where}: column {text_column!r} is not valid Unicode") from error
    return Document(value, value)


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


# Datasets


def _read_dataset(source: str, text_column: str) -> Iterator[Document]:
    name, _, config = source.removeprefix(HUB_PREFIX).partition(":")
    splits = load_dataset_splits(source, name, config or None)
    if "train" not in splits:
        raise InputError(f"{source!r} has no 'train' split; it has: {', '.join(splits)}")
    given = "validation" in splits
    wanted: list[Split] = ["train", "validation"] if given else ["train"]
    for split in wanted:
        _check_column(text_column, splits[split].column_names, repr(source))
        for batch in splits[split].select_columns([text_column]).iter(batch_size=1000):
            for value in batch[text_column]:
                document = _record(value, text_column, repr(source))
                yield document._replace(split=split) if given else document


def load_dataset_splits(source: str, name: str, config: str | None) -> Any:
    folder = Path(name).expanduser()
    is_local = bool(name) and folder.is_dir()
    if not is_local:
        if not is_hub_name(name):
            raise InputError(
                f"{source!r}: {name!r} is neither a folder nor a name on the Hub; "
                f"'{HUB_PREFIX}OWNER/NAME[:CONFIG]' is wanted"
            )
        require_hub(repr(source))

    import datasets

    try:
        if is_local and any((folder / f).is_file() for f in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(str(folder))
            return saved if isinstance(saved, dict) else {"train": saved}
        return datasets.load_dataset(str(folder) if is_local else name, config)
    except Exception as error:  # it lets through whatever its readers and HTTP client raise
        cause = error.__cause__
        for known in (error, cause):
            if isinstance(known, OSError) and known.errno == errno.ENOSPC:
                raise known from None
        reason = first_line(error) + (f": {first_line(cause)}" if cause else "")
        raise InputError(f"cannot load {source!r}: {reason}") from error
