"""What the commands that write a page have in common: its file, its labels, where it is."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from stablemask.errors import InputError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file beside ``path`` that takes its place at the end; it is made first, to fail before the work."""
    try:
        if path.is_dir():
            raise InputError(f"cannot write {path}: it is a folder; name a file as --out")
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.touch()
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror}; name another file as --out"
        ) from error
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def labels(names: Sequence[str]) -> list[str]:
    """The last part of each name, where these differ."""
    short = [Path(name).name or name for name in names]
    return short if len(set(short)) == len(short) else list(names)


def where_it_is(path: Path) -> str:
    return f"report   {path}\n         open it in a browser: {path.resolve().as_uri()}"
