"""From a source to packed training and validation tokens, cached on disk.

A cache entry is a folder, named by a key of everything its tokens depend on::

    <cache>/<key>/train.npy, validation.npy, tokenizer/

It is written under another name and renamed, so that it is there whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from stablemask.data.packing import PackedDataset, tokenize_documents
from stablemask.data.sources import split_documents
from stablemask.data.tokenizer import check_vocab_size, load_tokenizer, train_tokenizer
from stablemask.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE_FORMAT = 1


@dataclass
class Corpus:
    """A tokenizer, the packed splits of a source, and the key of their cache entry."""

    tokenizer: PreTrainedTokenizerBase
    train: PackedDataset
    validation: PackedDataset
    key: str


def prepare_corpus(
    source: str,
    *,
    block_size: int,
    vocab_size: int = 4096,
    tokenizer: str | None = None,
    text_column: str = "text",
    validation_fraction: float = 0.05,
    cache_dir: str | Path | None = None,
) -> Corpus:
    """Read, split, tokenise and pack ``source``, or find the result of an earlier run.

    The key covers the documents, their split, the tokenizer and the cache format, not the block
    size: runs at several block sizes share an entry. Where validation does not fill one block, the
    end of the training tokens is moved to its front until it does.

    Args:
        source: see :func:`~stablemask.data.sources.load_documents`, also for ``text_column`` and
            ``validation_fraction``.
        block_size: tokens per block, at least 2.
        vocab_size: size of the tokenizer that is trained on the training split.
        tokenizer: an existing tokenizer (folder or Hub name) instead of a trained one.
        cache_dir: where entries are kept; by default ``$STABLEMASK_CACHE``, else
            ``~/.cache/stablemask/corpora``.

    Raises:
        InputError: a bad source, tokenizer or setting, or less text than one training and one
            validation block.
        OSError: the entry cannot be written, such as on a full disk; nothing of it stays behind.
    """
    if block_size < 2:
        raise InputError(f"block size {block_size} is too small: at least 2 tokens are wanted")
    if tokenizer is None:
        check_vocab_size(vocab_size)
        existing, identity = None, f"byte-level BPE of {vocab_size}"
    else:
        existing = load_tokenizer(tokenizer)
        identity = _fingerprint(existing)
    train, validation = split_documents(
        source, text_column=text_column, validation_fraction=validation_fraction
    )

    key = _key(train, validation, identity)
    entry = _cache_dir(cache_dir) / key
    cached = _load(entry)
    if cached is None:
        from filelock import FileLock

        entry.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(entry.with_suffix(".lock")):
            cached = _load(entry)  # another process may have written it meanwhile
            if cached is None:
                _write(entry, train, validation, existing or train_tokenizer(train, vocab_size))
                cached = _load(entry)
    if cached is None:
        raise OSError(errno.EIO, "a cache entry that was just written cannot be read", str(entry))
    cached_tokenizer, train_tokens, validation_tokens = cached

    characters = sum(map(len, train)) + sum(map(len, validation))
    train_tokens, validation_tokens = _fill_validation(
        train_tokens, validation_tokens, block_size, source, characters
    )
    return Corpus(
        tokenizer=existing or cached_tokenizer,
        train=PackedDataset(train_tokens, block_size),
        validation=PackedDataset(validation_tokens, block_size),
        key=key,
    )


def _fill_validation(
    train: np.ndarray, validation: np.ndarray, block_size: int, source: str, characters: int
) -> tuple[np.ndarray, np.ndarray]:
    missing = block_size - len(validation)
    if missing > 0 and len(train) - missing >= block_size:
        validation = np.concatenate([train[-missing:], validation])
        train = train[:-missing]
    if min(len(train), len(validation)) < block_size:
        # what either split could reach at most: half of all, or what training has by itself
        largest = min(len(train), (len(train) + len(validation)) // 2)
        needed = math.ceil(characters * block_size / max(largest, 1))
        raise InputError(
            f"{source!r} is too short: its {len(train)} training and {len(validation)} validation "
            f"tokens do not fill a block of {block_size} each; give about {needed} characters "
            f"of text (it has {characters}), or a block size of at most {largest}"
        )
    return train, validation


# The cache


def _cache_dir(cache_dir: str | Path | None) -> Path:
    default = os.environ.get("STABLEMASK_CACHE") or "~/.cache/stablemask/corpora"
    return Path(cache_dir or default).expanduser().absolute()


def _key(train: Sequence[str], validation: Sequence[str], identity: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in ([str(CACHE_FORMAT), identity], train, validation):
        digest.update(len(part).to_bytes(8, "big"))
        for text in part:
            data = text.encode()
            digest.update(len(data).to_bytes(8, "big"))
            digest.update(data)
    return digest.hexdigest()


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the files ``tokenizer`` saves."""
    digest = hashlib.blake2b(digest_size=16)
    with tempfile.TemporaryDirectory() as folder:
        _save_tokenizer(tokenizer, Path(folder))
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _load(entry: Path) -> tuple[PreTrainedTokenizerBase, np.ndarray, np.ndarray] | None:
    """What ``entry`` holds, or None where it is missing or damaged."""
    if not entry.is_dir():
        return None
    try:
        train = np.load(entry / "train.npy", mmap_mode="r")
        validation = np.load(entry / "validation.npy", mmap_mode="r")
        return load_tokenizer(str(entry / "tokenizer")), train, validation
    except (FileNotFoundError, EOFError, ValueError):
        return None


def _write(
    entry: Path, train: Sequence[str], validation: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    tokens = {
        "train.npy": tokenize_documents(train, tokenizer),
        "validation.npy": tokenize_documents(validation, tokenizer),
    }
    unfinished = entry.with_suffix(".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
    try:
        unfinished.mkdir()
        for name, array in tokens.items():
            _save_array(array, unfinished / name)
        _save_tokenizer(tokenizer, unfinished / "tokenizer")
        shutil.rmtree(entry, ignore_errors=True)  # a damaged one
        os.replace(unfinished, entry)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _save_array(array: np.ndarray, path: Path) -> None:
    """``np.save``, which would lose the reason (errno) when the disk fills up midway."""
    with path.open("wb") as file:
        header = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array.data)


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # the tokenizers library raises a bare one when it cannot write
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(folder)) from error
