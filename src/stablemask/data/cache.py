"""Folders that are there whole or not at all, written by one process and read by all."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..errors import InputError
from ..reading import user_path
from ..writing import FULL_DISK

T = TypeVar("T")


def cache_folder(cache_dir: str | Path | None) -> Path:
    """``cache_dir``, else ``$STABLEMASK_CACHE``, else ``~/.cache/stablemask/corpora``."""
    default = os.environ.get("STABLEMASK_CACHE") or "~/.cache/stablemask/corpora"
    return user_path(cache_dir or default).absolute()


def hash_of(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        # The name of a file, and a token, may be no Unicode.
        data = part.encode(errors="surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def cached(entry: Path, load: Callable[[Path], T], write: Callable[[Path], None]) -> T:
    """What ``load`` reads from the folder ``entry``, which ``write`` fills where it is missing.

    It is filled under another name and then renamed. Of several processes one does so, and the
    others wait for it. Nothing stays behind where ``write`` fails or is interrupted.

    Args:
        load: raises OSError, EOFError, KeyError, TypeError or ValueError where the folder is missing
            or damaged; a damaged one is written anew.

    Raises:
        InputError: no folder can be made there.
        OSError: the folder cannot be written, such as on a full disk.
    """
    found = _load(entry, load)
    if found is not None:
        return found

    from filelock import FileLock

    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(entry.with_suffix(".lock")).acquire()
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise InputError(
            f"cannot keep tokens in '{entry.parent}': {error.strerror}; name another folder by "
            "$STABLEMASK_CACHE"
        ) from error
    with held:
        found = _load(entry, load)  # another process may have written it meanwhile
        if found is None:
            _write(entry, write)
            found = _load(entry, load)
    if found is None:
        raise OSError(errno.EIO, "a cache entry that was just written cannot be read", str(entry))
    return found


def _load(entry: Path, load: Callable[[Path], T]) -> T | None:
    if not os.path.isdir(entry):
        return None
    try:
        return load(entry)
    except (OSError, EOFError, KeyError, TypeError, ValueError):
        return None


def _write(entry: Path, write: Callable[[Path], None]) -> None:
    unfinished = entry.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    try:
        unfinished.mkdir()
        write(unfinished)
        shutil.rmtree(entry, ignore_errors=True)  # a damaged one
        os.replace(unfinished, entry)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


class TokenFile:
    """A file of token ids that grows, for :func:`read_tokens`.

    Attributes:
        size: tokens written so far.
        digest: of these tokens.
    """

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.size = 0
        self.digest = hashlib.blake2b(digest_size=16)
        self._file = path.open("wb")
        self.close = self._file.close

    def append(self, tokens: np.ndarray) -> None:
        tokens = np.ascontiguousarray(tokens, self.dtype)
        self._file.write(tokens.data)
        self.digest.update(tokens.data)
        self.size += len(tokens)


def read_tokens(path: Path, dtype: str | np.dtype, size: int) -> np.ndarray:
    """The tokens of a file, memory-mapped; ValueError where they are not ``size``."""
    if os.path.getsize(path) != size * np.dtype(dtype).itemsize:
        raise ValueError(f"'{path}' is not of {size} tokens")
    return np.memmap(path, dtype, "r") if size else np.empty(0, dtype)
