"""Where documents come from, and which of them are held out for validation.

A *source* is ``builtin``, a file or folder of text or of records, or ``hub:OWNER/NAME``.
Its unit is the *document*: a ``.txt``, ``.md`` or ``.py`` file, or one record of anything else. Documents
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

from __future__ import annotations

import errno
import hashlib
import os
import stat
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

from stablemask.data.files import (
    EXTENSIONS,
    check_column,
    is_records,
    is_text,
    read_rows,
    read_text,
    select,
    walk,
)
from stablemask.data.hub import is_hub_name, require_hub
from stablemask.errors import InputError
from stablemask.reading import first_line, reading, user_path

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
            its tests), the path of a file or folder (searched recursively), or
            ``"hub:OWNER/NAME[:CONFIG]"``, where ``OWNER/NAME`` may also be a local dataset folder.
            Text is ``.txt`` and ``.md``; records are ``.jsonl``, ``.json`` (an array, or lines),
            ``.csv`` and ``.tsv``; all of these also with ``.gz`` or ``.zst``, and ``.parquet``. A
            warning counts the other files of a folder. Of a dataset, the ``train`` and ``validation``
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
    sides: dict[Split, list[str]] = {"train": [], "validation": []}
    documents = read_documents(source, text_column)
    for side, text in split_stream(documents, validation_fraction):
        sides[side].append(text)
    return sides["train"], sides["validation"]


def read_documents(source: str, text_column: str = "text") -> Iterator[Document]:
    """The documents of ``source`` one after another, in an order that is the same on every run.

    Args:
        source: see :func:`load_documents`, also for ``text_column``.

    Raises:
        InputError: as :func:`load_documents`, where the trouble is met; a source without any text
            says so at its end.
    """
    yield from open_source(source).documents(text_column)


def is_held_out(document: Document, validation_fraction: float) -> bool:
    """Whether ``document`` belongs to validation, by the rule of the module."""
    if document.split is not None:
        return document.split == "validation"
    return uniform_hash(document.key) < validation_fraction


def split_stream(
    documents: Iterable[Document], validation_fraction: float
) -> Iterator[tuple[Split, str]]:
    """The texts of ``documents``, each with its side, by the rule of the module.

    Documents are held back only until there is one on either side, and none whose split is given.
    """
    check_validation_fraction(validation_fraction)
    held: list[tuple[Split, str]] | None = []
    for document in documents:
        side: Split = "validation" if is_held_out(document, validation_fraction) else "train"
        if held is None or document.split is not None:
            yield side, document.text
            continue
        held.append((side, document.text))
        if side != held[0][0]:
            yield from held
            held = None
    if held:
        train, validation = cut_documents([text for _, text in held], validation_fraction)
        yield from (("train", text) for text in train)
        yield from (("validation", text) for text in validation)


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


# Reading


class Source(ABC):
    """Documents that can be read more than once.

    Attributes:
        name: as the user gave it.
        num_bytes: of everything that will be read, as it is stored.
        position: how many of them have been read.
    """

    name: str
    num_bytes: int
    position: int = 0

    def documents(self, text_column: str) -> Iterator[Document]:
        """See :func:`read_documents`."""
        self.position = 0
        empty = True
        for document in self._read(text_column):
            if document.text and not document.text.isspace():
                empty = False
                yield document
        if empty:
            raise InputError(f"{self.name!r} holds no text")

    @abstractmethod
    def fingerprint(self) -> Iterator[str]:
        """What is another where a document is, found without reading the documents."""

    @abstractmethod
    def _read(self, text_column: str) -> Iterator[Document]: ...


def open_source(source: str) -> Source:
    """See :func:`load_documents` for what ``source`` may be.

    Raises:
        InputError: there is no such source.
    """
    if source == BUILTIN:
        return _StandardLibrary()
    if source.startswith(HUB_PREFIX):
        return _Dataset(source)
    return _path_source(source)


class _File(NamedTuple):
    path: Path
    name: str  # relative to the source
    size: int
    modified: int  # in nanoseconds


class _Files(Source):
    """Files of text and of records, in the order of their names."""

    def __init__(self, name: str, root: Path, paths: list[Path]) -> None:
        self.name = name
        self.files = [_file(path, root) for path in paths]
        self.num_bytes = sum(file.size for file in self.files)

    def fingerprint(self) -> Iterator[str]:
        for file in self.files:
            yield f"{file.name}\0{file.size}\0{file.modified}"

    def _read(self, text_column: str) -> Iterator[Document]:
        before = 0
        for file in self.files:
            for document, position in self._read_file(file, text_column):
                self.position = before + position
                yield document
            before += file.size
            self.position = before

    def _read_file(self, file: _File, text_column: str) -> Iterator[tuple[Document, int]]:
        """The documents of a file, each with how many of its bytes have been read."""
        if is_text(file.path):
            yield Document(read_text(file.path), file.name), file.size
            return
        for row in read_rows(file.path, text_column):
            yield _record(row.fields[text_column], text_column, row.where), row.position


def _file(path: Path, root: Path) -> _File:
    with reading(path):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"cannot read '{path}': it is no regular file, and data are read twice")
    return _File(path, path.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns)


class _StandardLibrary(_Files):
    _SKIPPED = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test")

    def __init__(self) -> None:
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in walk(root, self._SKIPPED) if path.suffix == ".py"]
        super().__init__(BUILTIN, root, paths)

    def fingerprint(self) -> Iterator[str]:
        yield sys.version
        yield from super().fingerprint()

    def _read_file(self, file: _File, text_column: str) -> Iterator[tuple[Document, int]]:
        text = file.path.read_bytes().decode("utf-8", errors="replace")
        yield Document(text, file.name), file.size


def _path_source(source: str) -> _Files:
    path = user_path(source)
    mode = 0
    with reading(path), suppress(FileNotFoundError):
        mode = path.stat().st_mode if source else 0
    if not mode:
        raise InputError(
            f"no file or folder {source!r}; a source is {BUILTIN!r}, a path, "
            f"or '{HUB_PREFIX}OWNER/NAME[:CONFIG]'"
        )
    if stat.S_ISDIR(mode):
        files = select(path, lambda file: is_text(file) or is_records(file))
        root, wrong = path, f"the folder {source!r} has no file that can be read, which are"
    else:
        files = [path] if is_text(path) or is_records(path) else []
        root, wrong = path.parent, f"{source!r} is not one of the files that can be read, which are"
    if not files:
        raise InputError(f"{wrong} {EXTENSIONS}")
    return _Files(source, root, files)


def _record(value: Any, column: str, where: str) -> Document:
    if value is None:
        value = ""
    if not isinstance(value, str):
        raise InputError(f"{where}: column {column!r} holds {type(value).__name__}, text is wanted")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise InputError(f"{where}: column {column!r} is not valid Unicode") from error
    return Document(value, value)


class _Dataset(Source):
    def __init__(self, source: str) -> None:
        self.name = source
        self.splits = dataset_splits(source)
        self.num_bytes = sum(split.data.nbytes for split in self.splits.values())

    def fingerprint(self) -> Iterator[str]:
        for name, split in self.splits.items():
            yield f"{name}\0{split._fingerprint}"

    def _read(self, text_column: str) -> Iterator[Document]:
        before = 0
        for name, split in self.splits.items():
            check_column(text_column, split.column_names, repr(self.name))
            bytes_per_row = split.data.nbytes / max(len(split), 1)
            rows = 0
            for batch in split.select_columns([text_column]).iter(batch_size=1000):
                for value in batch[text_column]:
                    rows += 1
                    self.position = before + int(rows * bytes_per_row)
                    document = _record(value, text_column, repr(self.name))
                    yield document._replace(split=name) if len(self.splits) > 1 else document
            before += split.data.nbytes


def dataset_splits(source: str) -> dict[Split, Any]:
    """The ``train`` split of a dataset, and the ``validation`` split where it has one with rows.

    Raises:
        InputError: it cannot be loaded, or has no ``train`` split.
    """
    splits = load_dataset_splits(source)
    wanted: dict[Split, Any] = {"train": splits["train"]}
    if len(splits.get("validation", [])):
        wanted["validation"] = splits["validation"]
    return wanted


def load_dataset_splits(source: str, *, streaming: bool = False) -> Any:
    """All splits of a dataset by name, a ``train`` split among them.

    Args:
        streaming: as iterable datasets, of which nothing is downloaded before it is read.

    Raises:
        InputError: it cannot be loaded, or has no ``train`` split.
    """
    name, _, config = source.removeprefix(HUB_PREFIX).partition(":")
    folder = user_path(name)
    is_local = bool(name) and os.path.isdir(folder)
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
            splits = saved if isinstance(saved, dict) else {"train": saved}
            if streaming:
                splits = {split: data.to_iterable_dataset() for split, data in splits.items()}
        else:
            splits = datasets.load_dataset(
                str(folder) if is_local else name, config or None, streaming=streaming
            )
    except Exception as error:  # it lets through whatever its readers and HTTP client raise
        cause = error.__cause__
        for known in (error, cause):
            if isinstance(known, OSError) and known.errno == errno.ENOSPC:
                raise known from None
        reason = first_line(error) + (f": {first_line(cause)}" if cause else "")
        raise InputError(f"cannot load {source!r}: {reason}") from error
    if "train" not in splits:
        raise InputError(f"{source!r} has no 'train' split; it has: {', '.join(splits)}")
    return splits
