"""The sources of a stream: read from any place in them, and nothing downloaded that is not read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from ..errors import InputError
from ..reading import first_line
from .files import check_column
from .sources import (
    HUB_PREFIX,
    Document,
    Split,
    is_held_out,
    load_dataset_splits,
    read_documents,
)

if TYPE_CHECKING:
    from datasets import IterableDataset

READ_ROWS = 256  # of a dataset, at a time


class Row(NamedTuple):
    """A document, and the place behind it in its source."""

    document: Document
    shard: int
    next_row: int


@dataclass
class Files:
    """``builtin``, a file or a folder: one shard, whose rows are its documents."""

    name: str
    text_column: str

    def read(self, shard: int, row: int) -> Iterator[Row]:
        documents = islice(read_documents(self.name, self.text_column), row, None)
        for next_row, document in enumerate(documents, start=row + 1):
            yield Row(document, shard, next_row)

    def held_out(self, validation_fraction: float) -> Iterator[Document]:
        for document in read_documents(self.name, self.text_column):
            if is_held_out(document, validation_fraction):
                yield document


@dataclass
class StreamedDataset:
    """A dataset of the library of that name, whose shards can be skipped unread."""

    name: str
    text_column: str
    train: IterableDataset
    validation: IterableDataset | None

    def read(self, shard: int, row: int) -> Iterator[Row]:
        return self._read("train", shard, row)

    def held_out(self, validation_fraction: float) -> Iterator[Document]:
        split: Split = "train" if self.validation is None else "validation"
        for row in self._read(split, 0, 0):
            if is_held_out(row.document, validation_fraction):
                yield row.document

    def _read(self, split: Split, shard: int, row: int) -> Iterator[Row]:
        dataset = self.train if split == "train" else self.validation
        assert dataset is not None
        given = None if self.validation is None else split
        shards = dataset.num_shards
        for number in range(shard, shards):
            texts = self._texts(dataset.shard(shards, number) if shards > 1 else dataset, row)
            for next_row, text in enumerate(texts, start=row + 1):
                if text and not text.isspace():
                    yield Row(Document(text, text, given), number, next_row)
            row = 0

    def _texts(self, dataset: IterableDataset, skipped: int) -> Iterator[str | None]:
        try:
            # By the batch: by the row, the library would divide the shards among DataLoader workers.
            for batch in dataset.skip(skipped).iter(READ_ROWS):
                check_column(self.text_column, batch, repr(self.name))
                for text in batch[self.text_column]:
                    if not isinstance(text, str | None):
                        raise InputError(
                            f"{self.name!r}: column {self.text_column!r} holds "
                            f"{type(text).__name__}, text is wanted"
                        )
                    yield text
        except InputError:
            raise
        except Exception as error:  # it lets through whatever its readers and HTTP client raise
            raise InputError(f"cannot read {self.name!r}: {first_line(error)}") from error


Source = Files | StreamedDataset


def open_streamed_source(source: str, text_column: str) -> Source:
    """See :func:`~stablemask.data.sources.load_documents` for what ``source`` may be.

    Raises:
        InputError: a dataset that cannot be loaded, or has no ``train`` split.
    """
    if not source.startswith(HUB_PREFIX):
        return Files(source, text_column)
    splits = load_dataset_splits(source, streaming=True)
    return StreamedDataset(source, text_column, splits["train"], splits.get("validation"))
