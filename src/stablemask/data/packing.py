"""Tokens as one flat array, and that array as blocks for training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stablemask.data.tokenizer import split_long

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_CHARACTERS = 1 << 21


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
    the end token stands between documents only. A fast tokenizer uses all cores; memory beyond the
    result is bounded by the batch. Long work shows a progress bar on a terminal.

    Returns:
        ``(num_tokens,)``, uint16 where the vocabulary allows it, else uint32.
    """
    from tqdm import tqdm

    end = tokenizer.eos_token_id
    dtype = np.uint16 if len(tokenizer) <= 1 << 16 else np.uint32
    encode = _encoder(tokenizer)
    total = sum(map(len, documents)) if isinstance(documents, Sequence) else None
    batches = [np.empty(0, dtype)]
    with tqdm(
        total=total, desc="tokenizing", unit="char", unit_scale=True, delay=1, disable=None
    ) as bar:
        for pieces, is_last in _batches(documents):
            ids: list[int] = []
            for piece_ids, ends_document in zip(encode(pieces), is_last, strict=True):
                ids += piece_ids
                if ends_document:
                    ids.append(end)
            batches.append(np.array(ids, dtype))
            bar.update(sum(map(len, pieces)))
    return np.concatenate(batches)


def _batches(documents: Iterable[str]) -> Iterator[tuple[list[str], list[bool]]]:
    """Pieces of documents by the batch, and of each whether it is the last of its document."""
    pieces: list[str] = []
    is_last: list[bool] = []
    characters = 0
    for document in documents:
        for piece in split_long(document):
            if characters + len(piece) > BATCH_CHARACTERS and pieces:
                yield pieces, is_last
                pieces, is_last, characters = [], [], 0
            pieces.append(piece)
            is_last.append(False)
            characters += len(piece)
        is_last[-1] = True
    if pieces:
        yield pieces, is_last


def _encoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[str]], list[list[int]]]:
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
