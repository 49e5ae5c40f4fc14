"""From a source, or a mixture of sources, to packed tokens, cached on disk, or streamed.

The cache has two kinds of entries, each a folder that is named by a hash of what it depends on::

    <cache>/<hash>/train.bin, validation.bin, meta.json
    <cache>/<hash>/tokenizer.json, ...

What that is can be found without reading a document: the names, sizes and modification times of the
files (of a dataset, the fingerprints that ``datasets`` gives it), and the settings. Preparing reads
the documents as a stream and appends to the arrays, in memory that does not grow with the source.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np

from .. import strict_json
from ..errors import InputError
from ..reading import read_json
from .cache import TokenFile, cache_folder, cached, hash_of, read_tokens
from .mixture import Mixture, parse_mixture
from .packing import PackedDataset, progress_bar, token_dtype, tokenize_stream
from .sources import Source, open_source
from .splitting import Split, check_validation_fraction, split_stream, uniform_hash
from .stream import TextStream
from .tokenizer import check_vocab_size, load_tokenizer, split_long, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CACHE_FORMAT = "4"
STREAM_FORMAT = 2
LANES = 64  # of a stream, at least
META_FILE = "meta.json"
TOKENIZER_BYTES = 1 << 30  # of a larger source, a tokenizer is trained on about as much

TrainData = TypeVar("TrainData", PackedDataset, Mixture, TextStream)


@dataclass
class Corpus(Generic[TrainData]):
    """A tokenizer, and packed tokens to train on and to validate with.

    ``key`` is a hash of all tokens, of the vocabulary and, in a mixture, of the weights: a copy of a
    source has that of the source. Of a stream, which is not read before, it is a hash of all settings
    and of the held-out tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    train: TrainData
    validation: PackedDataset
    key: str

    @property
    def num_train_tokens(self) -> int | None:
        """None of a stream."""
        return self.train.num_tokens


def prepare_corpus(
    source: str,
    *,
    block_size: int,
    vocab_size: int = 4096,
    tokenizer: str | None = None,
    text_column: str = "text",
    validation_fraction: float = 0.05,
    cache_dir: str | Path | None = None,
) -> Corpus[PackedDataset]:
    """Read, split, tokenise and pack ``source``, or find the result of an earlier run.

    That result is used for as long as the source has the same files, of the same sizes and times,
    and the settings are the same; runs at several block sizes share it. Where validation does not
    fill one block, the end of the training tokens is moved to its front until it does.

    Args:
        source: see :func:`~stablemask.data.sources.load_documents`, also for ``text_column`` and
            ``validation_fraction``.
        block_size: tokens per block, at least 2.
        vocab_size: size of the tokenizer that is trained on the training split, or on about a
            gigabyte of it.
        tokenizer: an existing tokenizer (folder or Hub name) instead of a trained one.
        cache_dir: where results are kept; by default ``$STABLEMASK_CACHE``, else
            ``~/.cache/stablemask/corpora``.

    Raises:
        InputError: a bad source, tokenizer or setting, or less text than one training and one
            validation block.
        OSError: the result cannot be written, such as on a full disk; nothing of it stays behind.
    """
    preparation = _Preparation(text_column, validation_fraction, cache_folder(cache_dir))
    loaded, (tokens,) = preparation.run([source], block_size, vocab_size, tokenizer)
    train, validation, key = tokens
    blocks = PackedDataset(train, block_size), PackedDataset(validation, block_size)
    return Corpus(loaded, *blocks, key)


def prepare_mixture(
    mixture: Sequence[str],
    *,
    block_size: int,
    vocab_size: int = 4096,
    tokenizer: str | None = None,
    text_column: str = "text",
    validation_fraction: float = 0.05,
    cache_dir: str | Path | None = None,
    seed: int = 0,
) -> Corpus[Mixture]:
    """Prepare each source of a mixture as :func:`prepare_corpus` does, with one tokenizer for all.

    Where none is given, it is trained on the training documents of all sources. Validation is that
    of the sources one after another.

    Args:
        mixture: items ``SOURCE=WEIGHT``; the weights are of any scale.
        seed: of the order of the sources.

    Raises:
        InputError: a bad item, or as of :func:`prepare_corpus`.
        OSError: as of :func:`prepare_corpus`.
    """
    weights = parse_mixture(mixture)
    folder = cache_folder(cache_dir)
    preparation = _Preparation(text_column, validation_fraction, folder)
    loaded, parts = preparation.run([*weights], block_size, vocab_size, tokenizer)
    train = Mixture([PackedDataset(p.train, block_size) for p in parts], [*weights.values()], seed)
    validation = _joined([part.validation for part in parts], [part.key for part in parts], folder)
    key = hash_of([*(part.key for part in parts), *map(str, train.counts)])
    return Corpus(loaded, train, PackedDataset(validation, block_size), key)


def prepare_stream(
    sources: str | Sequence[tuple[str, float]],
    *,
    block_size: int,
    tokenizer: str | None,
    text_column: str = "text",
    validation_fraction: float = 0.05,
    shuffle_buffer: int = 10_000,
    seed: int = 0,
    eval_tokens: int = 65536,
    global_batch_size: int = 1,
) -> Corpus[TextStream]:
    """Open sources for training and read what validation takes.

    Validation is the first held-out documents of a source, read from its start, that give ``eval_tokens``
    tokens, or a block if that is more; several sources give their weight's share each. A dataset with a
    validation split of its own keeps it.

    Args:
        sources: a source, see :func:`~stablemask.data.sources.load_documents`, or several, each with the
            weight of its blocks among all.
        tokenizer: folder or Hub name.
        shuffle_buffer: documents of a window, at least one for each lane.
        global_batch_size: samples of a step. The lanes are a multiple of it, at least ``LANES``, so that no
            two ranks tokenise the same one.

    Raises:
        InputError: no tokenizer, a source that cannot be read, or one too short to stream.
    """
    if tokenizer is None:
        raise InputError(
            "a stream is not read before it is trained on, so no tokenizer can be trained for it; "
            "name one: --tokenizer"
        )
    check_validation_fraction(validation_fraction)
    weighted = [(sources, 1.0)] if isinstance(sources, str) else list(sources)
    total = sum(weight for _, weight in weighted)
    loaded = load_tokenizer(tokenizer)
    stream = TextStream(
        [open_source(source, text_column, streaming=True) for source, _ in weighted],
        [weight / total for _, weight in weighted],
        loaded,
        block_size=block_size,
        validation_fraction=validation_fraction,
        shuffle_buffer=shuffle_buffer,
        seed=seed,
        lanes=global_batch_size * math.ceil(LANES / global_batch_size),
    )
    held_out: list[int] = []
    for source, (_, weight) in zip(stream.sources, weighted):
        stream.check_length(source)
        wanted = math.ceil(max(eval_tokens, block_size) * weight / total)
        held_out += stream.held_out_tokens(source, wanted)
    if len(held_out) < block_size:
        raise InputError(
            f"the held-out documents have {len(held_out)} tokens, less than a block of {block_size}; "
            "give more text, or leave out --streaming"
        )
    tokens = np.array(held_out, token_dtype(loaded))
    settings = [
        STREAM_FORMAT, weighted, text_column, block_size, validation_fraction, shuffle_buffer, seed,
        stream.lanes, sorted(loaded.get_vocab().items()),
    ]  # fmt: skip
    digest = hashlib.blake2b(json.dumps(settings).encode(), digest_size=16)
    digest.update(tokens.tobytes())
    return Corpus(loaded, stream, PackedDataset(tokens, block_size), digest.hexdigest())


class _Tokens(NamedTuple):
    train: np.ndarray
    validation: np.ndarray
    key: str


@dataclass
class _Preparation:
    text_column: str
    validation_fraction: float
    folder: Path

    def run(
        self, names: list[str], block_size: int, vocab_size: int, tokenizer: str | None
    ) -> tuple[PreTrainedTokenizerBase, list[_Tokens]]:
        """One tokenizer for the sources ``names``, and the tokens of each, a block on either side."""
        if block_size < 2:
            raise InputError(f"block size {block_size} is too small: at least 2 tokens are wanted")
        check_validation_fraction(self.validation_fraction)
        sources = [open_source(name, self.text_column) for name in names]
        if tokenizer is None:
            check_vocab_size(vocab_size)
            loaded = self._trained_tokenizer(sources, vocab_size)
        else:
            loaded = load_tokenizer(tokenizer)
        return loaded, [self._tokens(source, loaded, block_size) for source in sources]

    def _entry(self, sources: list[Source], tokenizer: str) -> Path:
        settings = [CACHE_FORMAT, tokenizer, self.text_column, repr(self.validation_fraction)]
        fingerprints = [hash_of(source.fingerprint()) for source in sources]
        return self.folder / hash_of([*settings, *fingerprints])

    def _sides(self, source: Source) -> Iterator[tuple[Split, str]]:
        return split_stream(source.documents(), self.validation_fraction)

    def _trained_tokenizer(self, sources: list[Source], vocab_size: int) -> PreTrainedTokenizerBase:
        share = TOKENIZER_BYTES / max(sum(source.num_bytes for source in sources), 1)

        def texts() -> Iterator[str]:
            for source in sources:
                for side, text in self._sides(source):
                    if side == "train":
                        yield from _sample(text, share)

        def write(entry: Path) -> None:
            _save_tokenizer(train_tokenizer(texts(), vocab_size), entry)

        entry = self._entry(sources, f"byte-level BPE of {vocab_size}")
        return cached(entry, lambda entry: load_tokenizer(str(entry)), write)

    def _tokens(
        self, source: Source, tokenizer: PreTrainedTokenizerBase, block_size: int
    ) -> _Tokens:
        def write(entry: Path) -> None:
            _write_tokens(entry, source, self._sides(source), tokenizer)

        entry = self._entry([source], _fingerprint(tokenizer))
        tokens, characters = cached(entry, _load_tokens, write)
        return _fill_validation(tokens, block_size, source.name, characters)


def _sample(text: str, share: float) -> Iterator[str]:
    if share >= 1:
        yield text
    else:
        yield from (piece for piece in split_long(text) if uniform_hash(piece) < share)


def _fill_validation(tokens: _Tokens, block_size: int, name: str, characters: int) -> _Tokens:
    train, validation, key = tokens
    missing = block_size - len(validation)
    if missing > 0 and len(train) - missing >= block_size:
        validation = np.concatenate([train[-missing:], validation])
        train = train[:-missing]
    if min(len(train), len(validation)) < block_size:
        # what either split could reach at most: half of all, or what training has by itself
        largest = min(len(train), (len(train) + len(validation)) // 2)
        needed = math.ceil(characters * block_size / max(largest, 1))
        raise InputError(
            f"{name!r} is too short: its {len(train)} training and {len(validation)} validation "
            f"tokens do not fill a block of {block_size} each; give about {needed} characters "
            f"of text (it has {characters}), or a block size of at most {largest}"
        )
    return _Tokens(train, validation, key)


# What is in the cache


def _write_tokens(
    entry: Path,
    source: Source,
    documents: Iterator[tuple[Split, str]],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    characters = 0

    def counted() -> Iterator[tuple[str, str]]:
        nonlocal characters
        for side, text in documents:
            characters += len(text)
            yield side, text

    dtype = token_dtype(tokenizer)
    with (
        closing(TokenFile(entry / "train.bin", dtype)) as train,
        closing(TokenFile(entry / "validation.bin", dtype)) as validation,
        progress_bar(None) as bar,
    ):
        files = {"train": train, "validation": validation}
        for tokens, batch_characters in tokenize_stream(counted(), tokenizer):
            for side, ids in tokens.items():
                files[side].append(ids)
            share_read = source.position / source.num_bytes
            bar.total = round(characters / share_read) if share_read else None
            bar.update(batch_characters)
    by_token = tokenizer.get_vocab()
    vocabulary: list[str] = sorted(by_token, key=by_token.__getitem__)
    meta = {
        "characters": characters,
        "dtype": dtype.name,
        "vocabulary": hash_of(vocabulary),
        "train": {"tokens": train.size, "hash": train.digest.hexdigest()},
        "validation": {"tokens": validation.size, "hash": validation.digest.hexdigest()},
    }
    (entry / META_FILE).write_text(strict_json.dumps(meta, indent=2))


def _load_tokens(entry: Path) -> tuple[_Tokens, int]:
    meta = read_json(entry / META_FILE)
    train, validation = (
        read_tokens(entry / f"{side}.bin", meta["dtype"], meta[side]["tokens"])
        for side in ("train", "validation")
    )
    key = hash_of([meta["train"]["hash"], meta["validation"]["hash"], meta["vocabulary"]])
    return _Tokens(train, validation, key), meta["characters"]


def _joined(arrays: list[np.ndarray], keys: list[str], folder: Path) -> np.ndarray:
    """``arrays`` one after another, in a file, as they may be large."""
    sizes, dtype = [len(array) for array in arrays], arrays[0].dtype

    def write(entry: Path) -> None:
        with closing(TokenFile(entry / "validation.bin", dtype)) as file:
            for array in arrays:
                file.append(array)

    def load(entry: Path) -> np.ndarray:
        return read_tokens(entry / "validation.bin", dtype, sum(sizes))

    return cached(folder / hash_of([CACHE_FORMAT, *keys, *map(str, sizes)]), load, write)


def _fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the files ``tokenizer`` saves."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _save_tokenizer(tokenizer, folder)
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return hash_of(part for path in paths for part in (path.name, path.read_bytes()))


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
