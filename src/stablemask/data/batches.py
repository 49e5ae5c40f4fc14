"""Which examples a step trains on, and who loads them: the same at any number of ranks and workers.

The samples of a run are numbered in the order of training. With ``A`` batches of ``B`` rows to a step on
each of ``R`` ranks, row ``j`` of batch ``m`` of rank ``r`` in step ``s`` is sample::

    k = ((s * A + m) * R + r) * B + j

so a step holds the same ``A * B * R`` samples however that product is made up. What sample ``k`` is
depends on the data and the seed alone.
"""

from __future__ import annotations

import itertools
import math
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from ..errors import InputError, RunError
from .chat import IGNORED
from .mixture import Mixture
from .stream import CURSOR, OpenStream, TextStream, derived_seed

Example = dict[str, Tensor]
Collate = Callable[[list[Example]], Example]
Cursors = dict[tuple[int, int], list[int]]  # of each source and lane the newest

WHOLE_SHUFFLE = 1 << 24
SHUFFLE_CHUNK = 1 << 20
PREFETCHED = 4  # batches that a worker has ready


class Shuffle:
    """The order in which a dataset of ``size`` examples is drawn from without end.

    Each epoch is a permutation: that of ``torch.randperm``, seeded with ``seed`` plus the epoch, which is
    the order of Accelerate's ``SeedableRandomSampler``. Above ``WHOLE_SHUFFLE`` examples, whose
    permutation would weigh too much in every process, the dataset is cut into chunks of
    ``SHUFFLE_CHUNK`` neighbours; the chunks come in random order, each shuffled. One permutation is kept.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self._first, self._start = 0, 0
        self._order = torch.empty(0, dtype=torch.int32)

    def __getitem__(self, n: int) -> int:
        """The index of the n-th draw."""
        if not 0 <= n - self._first < len(self._order):
            self._shuffle(n)
        return self._start + int(self._order[n - self._first])

    def _shuffle(self, n: int) -> None:
        """Make the order of the chunk that the n-th draw is from: its first draw, start and order."""
        epoch, n = divmod(n, self.size)
        self._first, self._start = epoch * self.size, 0
        if self.size <= WHOLE_SHUFFLE:
            self._order = _permutation(self.size, self.seed + epoch)
            return
        chunks = math.ceil(self.size / SHUFFLE_CHUNK)
        for chunk in _permutation(chunks, derived_seed(self.seed, epoch)).tolist():
            self._start = chunk * SHUFFLE_CHUNK
            length = min(SHUFFLE_CHUNK, self.size - self._start)
            if n < length:
                self._order = _permutation(length, derived_seed(self.seed, epoch, chunk))
                return
            n -= length
            self._first += length


def _permutation(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).to(torch.int32)


@dataclass(eq=False)
class TrainBatches(IterableDataset[Example]):
    """The batches of one rank, without end.

    Worker ``w`` of ``W`` yields every ``W``-th batch; a DataLoader takes them in turn.

    Args:
        examples: a dataset with a length, a :class:`Mixture` of such, or a :class:`TextStream`.
        seed: of the order of the examples. A stream has its own.
        batch_size: rows of a batch.
        accumulation: batches of a step.
        rank: of ``ranks`` that divide the data among them.
        step: the first optimizer step whose batches are wanted.
        collate: makes a batch of examples; by default their tensors are stacked.
        state: with a stream, the merged ``state_dict`` of all ranks after ``step`` steps.
    """

    examples: Any
    _: KW_ONLY
    seed: int
    batch_size: int
    accumulation: int = 1
    rank: int = 0
    ranks: int = 1
    step: int = 0
    collate: Collate | None = None
    state: InitVar[dict[str, Any] | None] = None

    def __post_init__(self, state: dict[str, Any] | None) -> None:
        self._cursors: Cursors = {}
        _keep_newest(self._cursors, (state or {}).get("cursors", []))

    def __iter__(self) -> Iterator[Example]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        batches = itertools.count(self.step * self.accumulation + first, stride)
        draw, collate = self._drawer(stride, first), self.collate or stack
        for batch in batches:
            yield collate([draw(k) for k in self._samples(batch)])

    def _samples(self, batch: int) -> range:
        start = (batch * self.ranks + self.rank) * self.batch_size
        return range(start, start + self.batch_size)

    def _drawer(self, stride: int, first: int) -> Callable[[int], Example]:
        """What gives this worker's samples by their number."""
        examples = self.examples
        if isinstance(examples, TextStream):
            begin = self.step * self.accumulation
            # The lanes of the samples repeat after as many batches as there are lanes, or sooner.
            batches = range(begin + first, begin + first + stride * examples.lanes, stride)
            lanes = {k % examples.lanes for batch in batches for k in self._samples(batch)}
            start = begin * self.ranks * self.batch_size
            return OpenStream(examples, lanes, start, self._cursors.values()).draw
        if isinstance(examples, Mixture):
            shuffles = [Shuffle(len(dataset), self.seed) for dataset in examples.datasets]

            def draw(k: int) -> Example:
                source, n = examples.locate(k)
                return examples.datasets[source][shuffles[source][n]]

            return draw
        shuffle = Shuffle(len(examples), self.seed)
        return lambda k: examples[shuffle[k]]

    def consumed(self, batch: Example) -> None:
        """Take out of a batch, before it goes to a device, what only its place in a stream needs."""
        if CURSOR in batch:
            _keep_newest(self._cursors, batch.pop(CURSOR).tolist())

    def state_dict(self) -> dict[str, Any]:
        """Where the streams stand after the consumed batches, for JSON; nothing where a step says all."""
        return {"cursors": sorted(self._cursors.values())} if self._cursors else {}


def merge_states(states: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The ``state_dict`` of a run from those of its ranks at one step."""
    cursors: Cursors = {}
    for state in states:
        _keep_newest(cursors, state.get("cursors", []))
    return {"cursors": sorted(cursors.values())} if cursors else {}


def _keep_newest(cursors: Cursors, others: Iterable[list[int]]) -> None:
    """Put ``others`` among ``cursors``; the greater of two is the newer, see :class:`Cursor`."""
    for cursor in others:
        lane = cursor[0], cursor[1]
        cursors[lane] = max(cursors.get(lane, cursor), cursor)


def stack(examples: list[Example]) -> Example:
    return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}


class _Padded(Dataset[Example]):
    """A dataset with copies behind its end, whose labels are all ignored."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, n: int) -> Example:
        if n < len(self):
            return self.dataset[n]
        example = self.dataset[len(self) - 1]
        return {**example, "labels": torch.full_like(example["labels"], IGNORED)}


def eval_loader(
    dataset: Any, batch_size: int, rank: int = 0, ranks: int = 1, collate: Collate | None = None
) -> DataLoader[Example]:
    """The batches of one rank over a whole dataset, as many on each rank, in order.

    Each example is on one rank, once. The last batches may be shorter than the others, the same on every
    rank; rows that are then missing are filled with a copy whose labels are all ignored.
    """
    batches = []
    for begin in range(0, len(dataset), batch_size * ranks):
        rows = min(batch_size, math.ceil((len(dataset) - begin) / ranks))
        begin += rank * rows
        batches.append(list(range(begin, begin + rows)))
    return DataLoader(
        _Padded(dataset),
        batch_sampler=batches,
        collate_fn=collate or stack,
        generator=torch.Generator(),
    )


def loader(
    batches: TrainBatches, workers: int = 0, pin_memory: bool = False
) -> DataLoader[Example]:
    """A DataLoader of batches that are made in ``workers`` processes, or here where that is 0.

    Iterating it raises :class:`RunError` where the data cannot be read on.
    """
    return _Loader(
        batches,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=PREFETCHED if workers else None,
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # or each start would draw from that of the model
        # A child that is forked shares the memory-mapped tokens, which pickling would copy.
        multiprocessing_context="fork" if workers and hasattr(os, "fork") else None,
    )


class _Loader(DataLoader[Example]):
    def __iter__(self) -> Iterator[Example]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except InputError as error:
            # A worker's comes with its traceback, whose last line is the message.
            message = str(error).strip().splitlines()[-1].removeprefix(f"{_NAME}: ")
            # The frames of its traceback would keep the workers, and their end, for the garbage collector.
            raise RunError(message) from error.with_traceback(None)


_NAME = f"{InputError.__module__}.{InputError.__qualname__}"


def _start_worker(worker: int) -> None:
    """Let a signal to all processes of a run, as of Ctrl-C or a scheduler, be the main process's alone.

    It ends its workers, and they end when it is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # which tells who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not outlive a fork


def _end_when_told() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
