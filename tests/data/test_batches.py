import gc
import itertools
import multiprocessing
import os
import signal
import time
from functools import partial
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from stablemask.data import PackedDataset, batches
from stablemask.data.batches import Shuffle, TrainBatches, eval_loader, loader, merge_states
from stablemask.data.chat import IGNORED, ChatDataset, pad_conversations
from stablemask.errors import InputError, RunError

SPLITS = [
    (1, 1, 24),
    (2, 3, 4),
    (4, 1, 6),
    (3, 8, 1),
    (2, 1, 12),
]  # ranks, accumulation, batch_size


@pytest.fixture
def blocks() -> PackedDataset:
    """Fifty blocks; the block at index ``i`` begins with the token ``2 i``."""
    return PackedDataset(np.arange(100, dtype=np.uint16), 2)


def global_order(make, ranks: int, steps: int, accumulation: int, workers: int = 0) -> list[dict]:
    """The batches of ``steps`` steps in the order of their samples; workers are simulated in turn."""
    infos = [SimpleNamespace(id=n, num_workers=workers) for n in range(workers)] or [None]
    made = [[iter(make(rank=rank, ranks=ranks)) for _ in infos] for rank in range(ranks)]
    found = []
    for index in range(steps * accumulation):
        for iterators in made:
            worker = index % len(infos)
            with mock.patch.object(batches, "get_worker_info", lambda w=worker: infos[w]):
                found.append(next(iterators[worker]))
    return found


def first_tokens(found: list[dict]) -> list[int]:
    return torch.cat([batch["input_ids"][:, 0] for batch in found]).tolist()


def test_order_is_that_of_accelerate():
    from accelerate.data_loader import SeedableRandomSampler

    sampler = SeedableRandomSampler(range(37), data_seed=5)
    expected = [index for _ in range(3) for index in sampler]
    shuffle = Shuffle(37, 5)
    assert [shuffle[n] for n in range(111)] == expected
    assert [shuffle[n] for n in (80, 3, 110)] == [expected[n] for n in (80, 3, 110)]


@settings(deadline=None)
@given(size=st.integers(11, 80), chunk=st.integers(1, 10), seed=st.integers(0, 9))
def test_large_datasets_are_shuffled_by_chunks(size, chunk, seed):
    with (
        mock.patch.object(batches, "WHOLE_SHUFFLE", 10),
        mock.patch.object(batches, "SHUFFLE_CHUNK", chunk),
    ):
        shuffle = Shuffle(size, seed)
        drawn = []
        for n in range(2 * size):
            drawn.append(shuffle[n])
            assert len(shuffle._order) <= chunk
        again = Shuffle(size, seed)
        assert [again[n] for n in reversed(range(2 * size))] == drawn[::-1]
    for epoch in (drawn[:size], drawn[size:]):
        assert sorted(epoch) == list(range(size))
        chunks = [index // chunk for index in epoch]
        assert len(list(itertools.groupby(chunks))) == -(-size // chunk)  # one after another
    if size > 20:
        assert drawn[:size] != drawn[size:]
        assert drawn[:size] != list(range(size))


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize(("ranks", "accumulation", "batch_size"), SPLITS)
def test_samples_of_a_step_do_not_depend_on_ranks_or_workers(
    blocks, ranks, accumulation, batch_size, workers
):
    shuffle = Shuffle(50, 7)
    expected = [2 * shuffle[n] for n in range(4 * 24)]
    make = partial(TrainBatches, blocks, seed=7, batch_size=batch_size, accumulation=accumulation)
    assert first_tokens(global_order(make, ranks, 4, accumulation, workers)) == expected
    resumed = global_order(partial(make, step=3), ranks, 1, accumulation, workers)
    assert first_tokens(resumed) == expected[3 * 24 :]


def test_worker_processes(blocks):
    made = TrainBatches(blocks, seed=1, batch_size=4)
    here = list(itertools.islice(loader(made), 9))
    there = list(itertools.islice(loader(made, workers=2), 9))
    assert first_tokens(here) == first_tokens(there)
    assert all(batch["labels"].equal(batch["input_ids"]) for batch in there)


def test_data_with_a_length_has_no_state(blocks):
    made = TrainBatches(blocks, seed=1, batch_size=4)
    batch = next(iter(made))
    made.consumed(batch)
    assert batch.keys() == {"input_ids", "labels"}
    assert made.state_dict() == merge_states([{}, {}]) == {}


def conversations(count: int) -> ChatDataset:
    """The n-th has ``n % 5 + 2`` tokens, all of them ``n + 1`` and scored."""
    lengths = [n % 5 + 2 for n in range(count)]
    return ChatDataset(
        [(np.full(m, n + 1, np.uint32), np.ones(m, bool)) for n, m in enumerate(lengths)]
    )


@settings(deadline=None)
@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 7),
    ranks=st.integers(1, 5),
)
def test_evaluation_sees_each_example_once(count, batch_size, ranks):
    dataset = conversations(count)
    found = [
        list(eval_loader(dataset, batch_size, rank, ranks, pad_conversations))
        for rank in range(ranks)
    ]
    assert len({len(of_rank) for of_rank in found}) == 1
    for of_all in zip(*found, strict=True):
        assert len({len(batch["input_ids"]) for batch in of_all}) == 1
        assert len(of_all[0]["input_ids"]) <= batch_size
    rows = [row for of_rank in found for batch in of_rank for row in zip(*batch.values())]
    scored = [int(labels.max()) for _, _, labels in rows if (labels != IGNORED).any()]
    assert sorted(scored) == list(range(1, count + 1))
    assert len(rows) - len(scored) < ranks
    assert all((mask == 1).any() for _, mask, _ in rows)


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_leaves_the_random_state_alone(blocks, workers):
    before = torch.get_rng_state()
    next(iter(loader(TrainBatches(blocks, seed=0, batch_size=4), workers)))
    next(iter(eval_loader(blocks, 4)))
    assert torch.get_rng_state().equal(before)


class Damaged(Dataset):
    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> dict:
        raise InputError("'a.jsonl', line 7: not a JSON record: it ends, early")


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_data_is_one_line(workers):
    before = multiprocessing.active_children()
    made = loader(TrainBatches(Damaged(), seed=0, batch_size=2), workers)
    with pytest.raises(RunError) as raised:
        next(iter(made))
    assert str(raised.value) == "'a.jsonl', line 7: not a JSON record: it ends, early"
    del raised, made
    assert not [child for child in multiprocessing.active_children() if child not in before]


def alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as stat:
            return stat.read().rsplit(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="reads /proc")
def test_workers_ignore_signals_and_end_with_the_main_process(blocks):
    gc.collect()  # workers of other tests, which the child would wait for
    receive, send = os.pipe()
    main = os.fork()
    if main == 0:
        others = multiprocessing.active_children()
        iterator = iter(loader(TrainBatches(blocks, seed=1, batch_size=4), workers=2))
        next(iterator)
        workers = [child for child in multiprocessing.active_children() if child not in others]
        if os.fork() == 0:
            for worker in workers:  # as a terminal or a scheduler does to a whole group
                os.kill(worker.pid, signal.SIGINT)
                os.kill(worker.pid, signal.SIGTERM)
            os._exit(0)
        os.wait()
        for _ in range(50):
            next(iterator)
        os.write(send, " ".join(str(worker.pid) for worker in workers).encode())
        time.sleep(60)
        os._exit(1)
    os.close(send)
    workers = [int(process) for process in os.read(receive, 100).split()]
    os.kill(main, signal.SIGKILL)
    os.waitpid(main, 0)
    assert len(workers) == 2
    deadline = time.monotonic() + 30
    while any(map(alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
