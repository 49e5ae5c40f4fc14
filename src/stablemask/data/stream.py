"""Documents that are read and tokenised while a model trains on them, and stored nowhere.

The documents of a source are dealt to *lanes*, and each lane packs its own into blocks: sample ``k`` of a
run is the next block of lane ``k mod lanes``. So a process tokenises nothing but the lanes that its
samples come from, and where each of these stands says all about the run: a block carries a *cursor*, with
which any process continues its lane behind it.

Documents are read ``shuffle_buffer`` at a time. Those of such a *window* are put in random order and dealt
one by one to the lane with the fewest characters of them, which keeps the lanes about abreast: a process
reads a window once, and holds the documents that its slower lanes have yet to come to. A source that ends
starts over.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from .mixture import Mixture
from .packing import encoder
from .sources import Row, Source
from .splitting import is_held_out
from .tokenizer import splitter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CURSOR = "cursor"  # the entry of an example


class Cursor(NamedTuple):
    """Where a lane goes on; of two cursors of a lane the newer one is the greater."""

    source: int
    lane: int
    window: int = 0  # counted over all epochs
    epoch: int = 0
    shard: int = 0  # where the window begins in the source
    row: int = 0
    document: int = 0  # among those that the window has for the lane
    piece: int = 0  # of the document, see splitter
    token: int = 0


@dataclass(eq=False)
class TextStream:
    """Numbered blocks of tokens, without end; see the module.

    Several sources are mixed by the block, as by a :class:`~stablemask.data.mixture.Mixture`.
    """

    num_tokens = None  # it has no end

    sources: Sequence[Source]
    weights: Sequence[float]
    tokenizer: PreTrainedTokenizerBase
    _: KW_ONLY
    block_size: int
    validation_fraction: float
    shuffle_buffer: int
    seed: int
    lanes: int

    def __post_init__(self) -> None:
        self.split = splitter(self.tokenizer)
        self.window = max(self.shuffle_buffer, self.lanes)
        self._mixture = Mixture([], self.weights, self.seed)

    def source_of(self, k: int) -> int:
        return self._mixture.locate(k)[0]

    def training(self, source: Source, shard: int = 0, row: int = 0) -> Iterator[Row]:
        """The rows of a source to train on, from a place in it."""
        for found in source.rows("train", shard, row):
            if not is_held_out(found.document, self.validation_fraction):
                yield found

    def check_length(self, source: Source) -> None:
        """Raise an error unless there is a document for each lane, and a block in all."""
        encode = self.encoder()
        documents = tokens = 0
        for row in self.training(source):
            documents += 1
            if tokens < self.block_size:
                tokens += sum(len(encode(piece)) for piece in self.split(row.document.text)) + 1
            if documents >= self.lanes and tokens >= self.block_size:
                return
        raise InputError(
            f"{source.name!r} is too short to stream: it has {documents} documents to train on, where at "
            f"least {self.lanes} with a block of {self.block_size} tokens are wanted; "
            "leave out --streaming"
        )

    def held_out_tokens(self, source: Source, wanted: int) -> list[int]:
        """The first ``wanted`` tokens of the documents held out, or as many as there are."""
        from stablemask.bars import progress_bar

        encode, end = self.encoder(), self.tokenizer.eos_token_id
        ids: list[int] = []
        with progress_bar(
            total=wanted, desc="held out", unit="token", unit_scale=True, delay=1
        ) as bar:
            for document, _, _ in source.rows("validation"):
                if not is_held_out(document, self.validation_fraction):
                    continue
                for piece in self.split(document.text):
                    ids += encode(piece)
                ids.append(end)
                bar.update(min(len(ids), wanted) - bar.n)
                if len(ids) >= wanted:
                    break
        return ids[:wanted]

    def encoder(self) -> Callable[[str], list[int]]:
        encode = encoder(self.tokenizer)
        return lambda text: encode([text])[0]


class OpenStream:
    """A stream that is being read, from sample ``start`` on, by one who draws only from ``lanes``.

    Args:
        cursors: that of the last block before ``start`` of every source and lane that had one.
    """

    def __init__(
        self,
        stream: TextStream,
        lanes: Collection[int],
        start: int = 0,
        cursors: Iterable[Sequence[int]] = (),
    ) -> None:
        self._stream = stream
        self._next = {lane: start + (lane - start) % stream.lanes for lane in lanes}
        cursor_of = {tuple(cursor[:2]): Cursor(*cursor) for cursor in cursors}
        encode = stream.encoder()
        self._blocks: dict[tuple[int, int], Iterator[dict[str, Tensor]]] = {}
        for source in range(len(stream.sources)):
            starts = {lane: cursor_of.get((source, lane), Cursor(source, lane)) for lane in lanes}
            dealer = _Dealer(stream, starts)
            for lane, cursor in starts.items():
                self._blocks[source, lane] = _pack(dealer, cursor, encode)

    def draw(self, k: int) -> dict[str, Tensor]:
        """Sample ``k`` as ``input_ids`` and ``labels``, one int64 tensor ``(block_size,)``, and its cursor.

        The samples of a lane are drawn in order; those that others draw are passed over.
        """
        lane = k % self._stream.lanes
        while True:
            n = self._next[lane]
            self._next[lane] += self._stream.lanes
            block = next(self._blocks[self._stream.source_of(n), lane])
            if n == k:
                return block


def _pack(
    dealer: _Dealer, start: Cursor, encode: Callable[[str], list[int]]
) -> Iterator[dict[str, Tensor]]:
    """The blocks of a lane."""
    size, end_token = dealer.stream.block_size, dealer.stream.tokenizer.eos_token_id
    first, token = start.piece, start.token
    block: list[int] = []
    for cursor, text in dealer.documents(start):
        pieces = list(dealer.stream.split(text))
        for piece in range(first, len(pieces)):
            ids = encode(pieces[piece])
            if piece == len(pieces) - 1:
                ids.append(end_token)
            while len(ids) - token >= size - len(block):
                begin, token = token, token + size - len(block)
                tokens = torch.tensor(block + ids[begin:token])
                behind = torch.tensor(cursor._replace(piece=piece, token=token))
                yield {"input_ids": tokens, "labels": tokens, CURSOR: behind}
                block = []
            block += ids[token:]
            token = 0
        first = 0


class _Dealer:
    """Reads the documents of a source and deals them to its lanes, some of which are kept."""

    def __init__(self, stream: TextStream, starts: dict[int, Cursor]) -> None:
        first = min(starts.values(), key=lambda cursor: cursor.window)
        self.stream = stream
        self._source = stream.sources[first.source]
        self._starts = starts
        # The window that is being read, and the cursor of its beginning.
        self._read_texts: list[str] = []
        self._window = first._replace(document=0, piece=0, token=0)
        self._rows = stream.training(self._source, first.shard, first.row)
        self._dealt: dict[int, deque[tuple[Cursor, list[str]]]] = {lane: deque() for lane in starts}
        self._share = math.ceil(stream.lanes / len(starts))

    def documents(self, start: Cursor) -> Iterator[tuple[Cursor, str]]:
        """The documents of a lane, each with the cursor of its beginning, from that of ``start`` on."""
        skipped = start.document
        dealt = self._dealt[start.lane]
        while True:
            while not dealt:
                self._read(self.stream.window)
            window, texts = dealt.popleft()
            for document in range(skipped, len(texts)):
                # The next windows are read bit by bit, or training would wait for all of one at once.
                self._read(self._share)
                yield window._replace(document=document), texts[document]
            skipped = 0

    def _read(self, count: int) -> None:
        """Read ``count`` documents, but no further than the window or the source goes."""
        count = min(count, self.stream.window - len(self._read_texts))
        rows = list(islice(self._rows, count))
        self._read_texts += [row.document.text for row in rows]
        if len(rows) < count:
            if not self._read_texts and (self._window.shard, self._window.row) == (0, 0):
                raise InputError(f"{self._source.name!r} holds no document to train on")
            self._deal()
            self._window = self._window._replace(epoch=self._window.epoch + 1, shard=0, row=0)
            self._rows = self.stream.training(self._source)
        elif len(self._read_texts) == self.stream.window:
            self._deal()
            self._window = self._window._replace(shard=rows[-1].shard, row=rows[-1].next_row)

    def _deal(self) -> None:
        """Deal the documents of the window, if there are any, and number the next one."""
        if not self._read_texts:
            return
        lanes, number = self.stream.lanes, self._window.window
        seed = derived_seed(self.stream.seed, self._window.source, number)
        generator = torch.Generator().manual_seed(seed)
        hands: list[list[str]] = [[] for _ in range(lanes)]
        # Of each lane its characters, and a random number, so that none comes first in every window.
        order = torch.randperm(lanes, generator=generator).tolist()
        heap = sorted((0, order[lane], lane) for lane in range(lanes))
        for index in torch.randperm(len(self._read_texts), generator=generator).tolist():
            text = self._read_texts[index]
            characters, place, lane = heap[0]
            heapq.heapreplace(heap, (characters + len(text), place, lane))
            hands[lane].append(text)
        for lane, dealt in self._dealt.items():
            if hands[lane] and number >= self._starts[lane].window:
                dealt.append((self._window._replace(lane=lane), hands[lane]))
        self._read_texts = []
        self._window = self._window._replace(window=number + 1)


def derived_seed(*parts: int) -> int:
    """A seed for torch that no other parts give."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # an int64
