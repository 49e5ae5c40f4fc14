"""Checkpoints that are whole or absent, and known to be whole when they are read.

A checkpoint is written into ``incomplete``, gets a manifest of its files' hashes, and is renamed to
``checkpoint-STEP``; it is removed the other way round. So whatever kills the process, a folder by
that name is complete, and a file that was damaged later is found by its hash.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from ..errors import InputError

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
    hashes = {path.name: _hash(path) for path in sorted(partial.iterdir()) if path.is_file()}
    (partial / MANIFEST).write_text(json.dumps(hashes, indent=2) + "\n")
    for path in partial.iterdir():
        _sync(path)
    os.replace(partial, final)
    _sync(final.parent)


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint so that no part of it can be taken for a whole one."""
    doomed = checkpoint.with_name(INCOMPLETE)
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(checkpoint, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def verify(checkpoint: Path) -> None:
    """Raise InputError where a file is missing or is not what was written."""
    try:
        hashes = json.loads((checkpoint / MANIFEST).read_text())
        damaged = [name for name, digest in hashes.items() if _hash(checkpoint / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        damaged = [str(getattr(error, "filename", None) or MANIFEST)]
    if damaged:
        raise InputError(
            f"{checkpoint} is damaged ({Path(damaged[0]).name} is missing or not what was written); "
            "remove that folder to resume from the checkpoint before it"
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
