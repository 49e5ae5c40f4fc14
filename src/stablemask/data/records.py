"""Whole records, for data that is more than text: of files of records, and datasets of the hub."""

from collections.abc import Iterator

from ..reading import user_path
from .files import Record, is_records, read_records_of, select, walk
from .sources import BUILTIN, HUB_PREFIX, DatasetSource


def first_record(source: str) -> Record | None:
    """The first record of a source; None where it is ``builtin``, text alone, or not there."""
    if source in ("", BUILTIN):
        return None
    if source.startswith(HUB_PREFIX):
        return next(read_records(source), None)
    path = user_path(source)
    files = filter(is_records, walk(path) if path.is_dir() else [path])
    return next((one for file in files if file.is_file() for one in read_records_of(file)), None)


def read_records(source: str) -> Iterator[Record]:
    """The records of a file, a folder or a dataset, one after another.

    A warning counts the other files of a folder, those of text among them.

    Raises:
        InputError: something cannot be read, or is no record.
    """
    if source.startswith(HUB_PREFIX):
        yield from DatasetSource(source).records()
        return
    path = user_path(source)
    for file in select(path, is_records) if path.is_dir() else [path]:
        yield from read_records_of(file)
