"""Tokens as one flat array, and that array as blocks for training."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stablemask.data.tokenizer import splitter, vocabulary_size

if TYPE_CHECKING:
    from tqdm import tqdm
    from transformers import PreTrainedTokenizerBase

BATCH_CHARACTERS = 1 << 21
BATCHES_AHEAD = 2


class PackedDataset(Dataset[dict[str, Tensor]]):
    """A flat array of token ids, cut into blocks of equal length.

    Blocks neither overlap nor stop at documents; tokens past the last whole block are left out.

    Attributes:
        tokens: ``(num_tokens,)``, uint16 or uint32, memory-mapped where it comes from the cache.
        block_size: tokens per block.
    """

    def __init__(self, tokens: np.ndarray, block_size: int) -> None:
        self.tokens = tokens
        self.block_size = block_size

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    def __len__(self) -> int:
        return len(self.tokens) // self.block_size

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Block ``index`` as ``input_ids`` and ``labels``: one int64 tensor ``(block_size,)``.

        Labels are not shifted; a Transformers model does that itself.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        start = index * self.block_size
        block = torch.from_numpy(self.tokens[start : start + self.block_size].astype(np.int64))
        return {"input_ids": block, "labels": block}


def tokenize_documents(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Token ids of all documents, each followed by the end token.

    What looks like a special token inside a document is encoded as the ordinary text it is, so that
    the end token stands between documents only. A fast tokenizer uses all cores. Memory beyond the
    result is bounded by the batch, or by the longest documents where a tokenizer needs them whole, see
    :func:`~stablemask.data.tokenizer.splitter`. Long work shows a progress bar on a terminal.

    Returns:
        ``(num_tokens,)``, uint16 where the vocabulary allows it, else uint32.
    """
    total = sum(map(len, documents)) if isinstance(documents, Sequence) else None
    batches = [np.empty(0, token_dtype(tokenizer))]
    with progress_bar(total) as bar:
        for tokens, characters in tokenize_stream((("", text) for text in documents), tokenizer):
            batches += tokens.values()
            bar.update(characters)
    return np.concatenate(batches)


def tokenize_stream(
    documents: Iterable[tuple[str, str]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Token ids of documents by the batch, those of each side apart.

    Threads encode ``BATCHES_AHEAD`` batches while the caller writes or reads others.

    Args:
        documents: each with the side it belongs to.

    Yields:
        The tokens of each side, as of :func:`tokenize_documents`, and the characters of all sides.
    """
    end = [tokenizer.eos_token_id]
    dtype = token_dtype(tokenizer)
    encode = encoder(tokenizer)

    def finish(
        batch: list[_Piece], encoded: Future[list[list[int]]]
    ) -> tuple[dict[str, np.ndarray], int]:
        sides: dict[str, list[list[int]]] = {}
        for piece, ids in zip(batch, encoded.result(), strict=True):
            sides.setdefault(piece.side, []).extend((ids, end) if piece.is_last else (ids,))
        tokens = {side: np.fromiter(chain(*ids), dtype) for side, ids in sides.items()}
        return tokens, sum(len(piece.text) for piece in batch)

    waiting: deque[tuple[list[_Piece], Future[list[list[int]]]]] = deque()
    with ThreadPoolExecutor(BATCHES_AHEAD) as threads:
        for batch in _batches(documents, splitter(tokenizer)):
            waiting.append((batch, threads.submit(encode, [piece.text for piece in batch])))
            if len(waiting) > BATCHES_AHEAD:
                yield finish(*waiting.popleft())
        while waiting:
            yield finish(*waiting.popleft())


def token_dtype(tokenizer: PreTrainedTokenizerBase) -> np.dtype:
    return np.dtype(np.uint16 if vocabulary_size(tokenizer) <= 1 << 16 else np.uint32)


def progress_bar(total: int | None) -> tqdm[NoReturn]:
    from stablemask import bars

    return bars.progress_bar(total=total, desc="tokenizing", unit="char", unit_scale=True, delay=1)


class _Piece(NamedTuple):
    side: str
    text: str
    is_last: bool  # of its document


def _batches(
    documents: Iterable[tuple[str, str]], split: Callable[[str], Iterator[str]]
) -> Iterator[list[_Piece]]:
    batch: list[_Piece] = []
    characters = 0
    for side, document in documents:
        for text in split(document):
            if characters + len(text) > BATCH_CHARACTERS and batch:
                yield batch
                batch, characters = [], 0
            batch.append(_Piece(side, text, False))
            characters += len(text)
        batch[-1] = batch[-1]._replace(is_last=True)
    if batch:
        yield batch


def encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[list[int]]]:
    """A function from texts to their token ids, in which what looks like a special token is text."""
    if not tokenizer.is_fast:
        return lambda texts: tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]

    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(
        tokenizer.backend_tokenizer.to_str()
    )  # the caller's stays as it is
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()

    def encode(texts: list[str]) -> list[list[int]]:
        encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    return encode
