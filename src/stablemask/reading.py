"""Reading what a user names: whatever goes wrong is told in one line."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import InputError


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def reading(path: str | os.PathLike) -> Iterator[None]:
    """Raise what goes wrong with ``path`` inside as :class:`InputError`, with the system's reason.

    That is a missing file, a folder in its place, a loop of links, a name too long, a broken device, or
    compressed data that is cut short or damaged.
    """
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"cannot read '{path}': {reason}") from error


def user_path(path: str | os.PathLike) -> Path:
    """The path that a user writes, with ``~`` for a home.

    Raises:
        InputError: there is no such home, or it holds a null character.
    """
    if "\0" in os.fspath(path):
        raise InputError(f"cannot read {os.fspath(path)!r}: no path holds a null character")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"cannot read '{path}': {first_line(error)}") from error


def parse_json(text: str | bytes) -> Any:
    """``json.loads``, but for what is nested too deep for it, which is a ValueError as well."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file in UTF-8.

    Raises:
        InputError: it cannot be read, or is not JSON.
    """
    with reading(path):
        content = Path(path).read_bytes()
    try:
        return parse_json(content)
    except ValueError as error:
        raise InputError(f"'{path}' is not JSON: {first_line(error)}") from error
