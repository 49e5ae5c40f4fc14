"""Where documents come from.

A *source* is ``builtin``, ``builtin:packages``, a file or folder of text or of records, or ``hub:OWNER/NAME``.
Its unit is the *document*: a ``.txt``, ``.md`` or ``.py`` file, or one record of anything else. Documents
without text are left out. Which of them are held out says ``splitting.py``.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import stat
import sys
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from ..errors import InputError
from ..reading import first_line, reading, user_path
from .files import (
    EXTENSIONS,
    Record,
    check_column,
    is_records,
    is_text,
    read_records_of,
    read_text,
    select,
    walk,
)
from .hub import local_or_hub
from .splitting import Document, Split, split_stream

if TYPE_CHECKING:
    from datasets import IterableDataset

BUILTIN = "builtin"
PACKAGES = "builtin:packages"
HUB_PREFIX = "hub:"
READ_ROWS = 256  # of a dataset, at a time


class Row(NamedTuple):
    """A document, and the place behind it in its source."""

    document: Document
    shard: int
    next_row: int


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
            its tests), ``"builtin:packages"`` (the same and the installed packages, each text once), the
            path of a file or folder (searched recursively), or
            ``"hub:OWNER/NAME[:CONFIG]"``, where ``OWNER/NAME`` may also be a local dataset folder.
            Text is ``.txt`` and ``.md``; records are ``.jsonl``, ``.json`` (an array, or lines),
            ``.csv`` and ``.tsv``; all of these also with ``.gz`` or ``.zst``, and ``.parquet``. A
            warning counts the other files of a folder. Of a dataset, the ``train`` and ``validation``
            splits are read; other splits stay untouched.
        split: which documents; ``"all"`` is both sides, uncut. See
            :mod:`~stablemask.data.splitting` for the rule.
        text_column: the field of a record that holds its text.
        validation_fraction: between 0 and 1, the expected share of validation.

    Raises:
        InputError: the source is missing, empty, damaged, not text, or lacks the column.
    """
    documents = read_documents(source, text_column)
    if split == "all":
        return [document.text for document in documents]
    if split not in ("train", "validation"):
        raise InputError(f"split {split!r} is not one of 'train', 'validation', 'all'")
    sides = split_stream(documents, validation_fraction)
    return [text for side, text in sides if side == split]


def read_documents(source: str, text_column: str = "text") -> Iterator[Document]:
    """The documents of ``source`` one after another, in an order that is the same on every run.

    Args:
        source: see :func:`load_documents`, also for ``text_column``.

    Raises:
        InputError: as :func:`load_documents`, where the trouble is met; a source without any text
            says so at its end.
    """
    yield from open_source(source, text_column).documents()


class Source(ABC):
    """Documents that can be read more than once.

    Attributes:
        name: as the user gave it.
        text_column: the field of a record that holds its text.
        num_bytes: of everything that will be read, as it is stored; 0 of what is downloaded as it is read.
        position: how many of them :meth:`documents` has read.
    """

    num_bytes: int = 0
    position: float = 0

    def __init__(self, name: str, text_column: str) -> None:
        self.name = name
        self.text_column = text_column

    def documents(self) -> Iterator[Document]:
        """See :func:`read_documents`."""
        self.position = 0
        empty = True
        for document in self._read():
            if document.text and not document.text.isspace():
                empty = False
                yield document
        if empty:
            raise InputError(f"{self.name!r} holds no text")

    def rows(self, split: Split, shard: int = 0, row: int = 0) -> Iterator[Row]:
        """The documents that those of ``split`` are among, from a place on."""
        documents = islice(self.documents(), row, None)
        for next_row, document in enumerate(documents, start=row + 1):
            yield Row(document, shard, next_row)

    @abstractmethod
    def fingerprint(self) -> Iterator[str]:
        """What is another where a document is, found without reading the documents."""

    @abstractmethod
    def _read(self) -> Iterator[Document]: ...


def open_source(source: str, text_column: str = "text", *, streaming: bool = False) -> Source:
    """See :func:`load_documents` for what ``source`` and ``text_column`` may be.

    Args:
        streaming: nothing of a dataset on the Hub is downloaded before it is read.

    Raises:
        InputError: there is no such source.
    """
    if source == BUILTIN:
        return _StandardLibrary(text_column)
    if source == PACKAGES:
        return _InstalledPackages(text_column)
    if source.startswith(HUB_PREFIX):
        return DatasetSource(source, text_column, streaming=streaming)
    return _path_source(source, text_column)


class _File(NamedTuple):
    path: Path
    name: str  # relative to the source
    size: int
    modified: int  # in nanoseconds


class _Files(Source):
    """Files of text and of records, in the order of their names."""

    def __init__(self, name: str, text_column: str, root: Path, paths: list[Path]) -> None:
        super().__init__(name, text_column)
        self.files = [_file(path, root) for path in paths]
        self.num_bytes = sum(file.size for file in self.files)

    def fingerprint(self) -> Iterator[str]:
        for file in self.files:
            yield f"{file.name}\0{file.size}\0{file.modified}"

    def _read(self) -> Iterator[Document]:
        before = 0
        for file in self.files:
            for document, position in self._read_file(file):
                self.position = before + position
                yield document
            before += file.size
            self.position = before

    def _read_file(self, file: _File) -> Iterator[tuple[Document, int]]:
        """The documents of a file, each with how many of its bytes have been read."""
        if is_text(file.path):
            yield Document(read_text(file.path), file.name), file.size
            return
        for record in read_records_of(file.path, self.text_column):
            value = record.fields[self.text_column]
            yield _document(value, self.text_column, record.where), record.position


def _file(path: Path, root: Path) -> _File:
    with reading(path):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise InputError(f"cannot read '{path}': it is no regular file, and data are read twice")
    return _File(path, path.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns)


class _StandardLibrary(_Files):
    _SKIPPED = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test")

    def __init__(self, text_column: str) -> None:
        root = Path(sysconfig.get_path("stdlib"))
        paths = [path for path in walk(root, self._SKIPPED) if path.suffix == ".py"]
        super().__init__(BUILTIN, text_column, root, paths)

    def fingerprint(self) -> Iterator[str]:
        yield sys.version
        yield from super().fingerprint()

    def _read_file(self, file: _File) -> Iterator[tuple[Document, int]]:
        text = file.path.read_bytes().decode("utf-8", errors="replace")
        yield Document(text, file.name), file.size


class _InstalledPackages(_StandardLibrary):
    """The standard library, then the packages by name; tests are left out, and so is a text that was read before.

    Attributes:
        packages: version by name.
    """

    def __init__(self, text_column: str) -> None:
        super().__init__(text_column)
        self.name = PACKAGES
        self.packages: dict[str, str] = {}
        found: dict[Path, _File] = {}
        for package in sorted(importlib.metadata.distributions(), key=_name_of):
            root = Path(str(package.locate_file("")))
            files = [
                root / file
                for file in sorted(package.files or (), key=str)
                if file.suffix == ".py" and not {"..", *self._SKIPPED} & set(file.parts)
            ]
            files = [path for path in files if path not in found and path.is_file()]
            if files and _name_of(package) not in self.packages:
                self.packages[_name_of(package)] = package.version
                found |= {path: _file(path, root) for path in files}
        self.files += [file._replace(name=f"site-packages/{file.name}") for file in found.values()]
        self.num_bytes = sum(file.size for file in self.files)

    def fingerprint(self) -> Iterator[str]:
        yield from (f"{name}\0{version}" for name, version in self.packages.items())
        yield from super().fingerprint()

    def _read(self) -> Iterator[Document]:
        seen = set()  # copies of one file would stand on both sides
        for document in super()._read():
            digest = hashlib.blake2b(document.text.encode(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                yield document


def _name_of(package: importlib.metadata.Distribution) -> str:
    return (package.metadata["Name"] or "").lower()  # a broken installation has none


def packages_of(source: str) -> dict[str, str]:
    """Version by name of the packages that a source is made of; none but of ``builtin:packages``."""
    return _InstalledPackages("text").packages if source == PACKAGES else {}


def _path_source(source: str, text_column: str) -> _Files:
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
    return _Files(source, text_column, root, files)


def _document(value: Any, column: str, where: str) -> Document:
    if value is None:
        value = ""
    if not isinstance(value, str):
        raise InputError(f"{where}: column {column!r} holds {type(value).__name__}, text is wanted")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half of a surrogate pair
        raise InputError(f"{where}: column {column!r} is not valid Unicode") from error
    return Document(value, value)


class DatasetSource(Source):
    """A dataset, by the library of that name, which can be read from any row of any shard on."""

    def __init__(self, name: str, text_column: str = "text", *, streaming: bool = False) -> None:
        import datasets

        super().__init__(name, text_column)
        loaded = _load_dataset(name, streaming)
        self.splits: dict[Split, IterableDataset] = {}
        self._fingerprints, num_rows = [], 0
        for split in get_args(Split):
            data = loaded.get(split)
            if isinstance(data, datasets.Dataset):
                if split == "validation" and not len(data):
                    continue
                self._fingerprints.append(f"{split}\0{data._fingerprint}")
                self.num_bytes += data.data.nbytes
                num_rows += len(data)
                data = data.to_iterable_dataset()
            if data is not None:
                self.splits[split] = data
        self._bytes_per_row = self.num_bytes / max(num_rows, 1)

    def fingerprint(self) -> Iterator[str]:
        yield from self._fingerprints

    def records(self) -> Iterator[Record]:
        """Whole records, of all splits."""
        for split, data in self.splits.items():
            for number, fields in enumerate(data, start=1):
                where = f"{self.name!r}, {split} row {number}"
                yield Record(fields, where, split=self._given(split))

    def rows(self, split: Split, shard: int = 0, row: int = 0) -> Iterator[Row]:
        data = self.splits.get(split, self.splits["train"])
        for number in range(shard, data.num_shards):
            part = data.shard(data.num_shards, number) if data.num_shards > 1 else data
            for next_row, document in enumerate(self._documents(part, row), start=row + 1):
                if document.text and not document.text.isspace():
                    yield Row(document._replace(split=self._given(split)), number, next_row)
            row = 0

    def _given(self, split: Split) -> Split | None:
        return split if len(self.splits) > 1 else None

    def _read(self) -> Iterator[Document]:
        for split in self.splits:
            yield from (row.document for row in self.rows(split))

    def _documents(self, data: IterableDataset, skipped: int) -> Iterator[Document]:
        where = repr(self.name)
        try:
            if data.column_names:  # which may be known by reading alone
                check_column(self.text_column, data.column_names, where)
                data = data.select_columns([self.text_column])
            # By the batch: by the row, the library would divide the shards among DataLoader workers.
            for batch in data.skip(skipped).iter(READ_ROWS):
                check_column(self.text_column, batch, where)
                for value in batch[self.text_column]:
                    self.position += self._bytes_per_row
                    yield _document(value, self.text_column, where)
        except InputError:
            raise
        except Exception as error:  # it lets through whatever its readers and HTTP client raise
            raise InputError(f"cannot read {where}: {first_line(error)}") from error


def _load_dataset(source: str, streaming: bool) -> Any:
    """All splits of a dataset by name, a ``train`` split among them; those on the disk are never streamed."""
    name, _, config = source.removeprefix(HUB_PREFIX).partition(":")
    found = local_or_hub(
        name,
        repr(source),
        f"{name!r} is neither a folder nor a name on the Hub; '{HUB_PREFIX}OWNER/NAME[:CONFIG]' is wanted",
    )

    import datasets

    try:
        if any(Path(found, file).is_file() for file in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(found)
            splits = saved if isinstance(saved, dict) else {"train": saved}
        else:
            splits = datasets.load_dataset(found, config or None, streaming=streaming)
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
