"""Checkpoints that are whole or absent, and known to be whole when they are read.

A checkpoint is written into ``incomplete``, gets a manifest of its files' hashes, and is renamed to
``checkpoint-STEP``; it is removed the other way round. So whatever kills the process, a folder by
that name is complete, and a file that was damaged later is found by its hash; the run then goes on from
the checkpoint before it.
"""

import hashlib
import os
import re
import shutil
import sys
from pathlib import Path

from .. import strict_json
from ..errors import InputError
from ..reading import parse_json

INCOMPLETE = "incomplete"
MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    if not folder.is_dir():
        return []
    found = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for match, path in sorted(found, key=lambda pair: int(pair[0].group(1)))]


def step_of(checkpoint: Path) -> int:
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None
    return int(match.group(1))


def commit(partial: Path, final: Path) -> None:
    """Give a written folder its manifest and its name."""
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    hashes = {path.relative_to(partial).as_posix(): _hash(path) for path in files}
    (partial / MANIFEST).write_text(strict_json.dumps(hashes, indent=2) + "\n")
    for path in (partial, *partial.rglob("*")):
        _sync(path)
    os.replace(partial, final)
    _sync(final.parent)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that no part of it can be taken for a whole one."""
    doomed = checkpoint.with_name(INCOMPLETE)
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def last_whole(folder: Path) -> Path | None:
    """The latest checkpoint that is what was written; damaged ones after it are named and set aside.

    Raises:
        InputError: there are checkpoints, and none is whole.
    """
    damaged: dict[Path, InputError] = {}
    for checkpoint in reversed(list_checkpoints(folder)):
        try:
            verify(checkpoint)
            break
        except InputError as error:
            damaged[checkpoint] = error
    else:
        if damaged:
            raise InputError(
                f"{'; '.join(map(str, damaged.values()))}; no checkpoint is whole, so remove "
                f"{folder.parent} to start the run again"
            )
        return None
    for bad, reason in damaged.items():
        aside = bad.with_name(f"damaged-{bad.name}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(bad, aside)
        print(
            f"stablemask: {reason}, and kept as {aside.name}; going on from {checkpoint.name}",
            file=sys.stderr,
        )
    return checkpoint


def verify(checkpoint: Path) -> None:
    """Raise InputError where a file is missing or is not what was written."""
    try:
        hashes = parse_json((checkpoint / MANIFEST).read_bytes())
        damaged = [name for name, digest in hashes.items() if _hash(checkpoint / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        damaged = [str(getattr(error, "filename", None) or MANIFEST)]
    if damaged:
        raise InputError(
            f"{checkpoint} is damaged ({Path(damaged[0]).name} is missing or not what was written)"
        )


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.blake2b(digest_size=16)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
