"""Writing where a user says: one process at a time, and what goes wrong is told in one line."""

from __future__ import annotations

import errno
import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import InputError

# What another path would mend; anything else, such as a full disk, is the machine's fault.
BAD_PATH = {
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR,
    errno.EPERM, errno.EROFS,
}  # fmt: skip
FULL_DISK = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Raise as :class:`InputError` what goes wrong inside where ``path`` cannot be written to."""
    try:
        yield
    except OSError as error:
        # /proc has no place for a folder.
        if error.errno not in BAD_PATH | {errno.ENOENT}:
            raise
        reason = "it is no folder" if isinstance(error, FileExistsError) else error.strerror
        raise InputError(f"cannot write to '{path}': {reason}; name another --out") from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file, and the folders it needs, as :func:`whole_file` does; text as UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_file(path: str | os.PathLike) -> Iterator[Path]:
    """A name to write under, so that the file at ``path`` is whole or as it was.

    It lies in a hidden folder beside ``path``, which is made first, to fail before the work. At the end all that is
    in it takes its place.

    Raises:
        InputError: ``path`` is no place for a file.
    """
    path = Path(path)
    with writing(path):
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "no ordinary file"
            raise InputError(f"cannot write {path}: it is {kind}; name a file as --out")
        beside = tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-")
    with beside as folder:
        yield Path(folder, path.name)
        # The file of that name last: what a library wrote beside it, such as weights, is there by then.
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.with_name(file.name))


@contextmanager
def only_writer(out: Path, *, is_file: bool = False) -> Iterator[None]:
    """Make the folder ``out``, or that of a file, and keep other processes from writing there as well.

    The lock is the system's, and goes with this process however it ends. A folder that is still empty at
    the end is removed again.

    Raises:
        InputError: another process writes there, or it is no place to write to.
    """
    folder = out.parent if is_file else out
    lock = folder / (f".{out.name}.lock" if is_file else ".lock")
    made: list[Path] = []
    try:
        with writing(out):
            made += [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = _locked(lock, out)
        _held.add(descriptor)
        try:
            yield
        finally:
            if descriptor in _held:  # else this is a child, forked inside
                lock.unlink(missing_ok=True)
                _held.remove(descriptor)
                os.close(descriptor)
    finally:
        for path in made:
            with suppress(OSError):  # it holds something now
                path.rmdir()


def _locked(lock: Path, out: Path) -> int:
    """A descriptor of a lock file that is held."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(
                f"another process is writing to {out}; let it end or stop it, or name another --out"
            ) from None
        except OSError as error:
            print(
                f"stablemask: no lock can be had on {out} ({error.strerror}); see to it that nothing "
                "else writes there",
                file=sys.stderr,
            )
        if os.fstat(descriptor).st_nlink:  # else the one who held it has just removed it
            return descriptor
        os.close(descriptor)


def _let_go() -> None:
    while _held:
        os.close(_held.pop())


_held: set[int] = set()
# A child that loads data may outlive this process, and would keep what it holds. (filelock does this in
# its latest versions only.)
os.register_at_fork(after_in_child=_let_go)
