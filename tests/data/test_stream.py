import gzip
import json
import random
import re
from collections import Counter
from functools import partial
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stablemask.data import corpus, load_documents, tokenize_documents, train_tokenizer
from stablemask.data.batches import TrainBatches, loader, merge_states
from stablemask.data.corpus import prepare_stream
from stablemask.data.sources import open_source
from stablemask.data.stream import CURSOR, Cursor, OpenStream, TextStream
from stablemask.errors import InputError
from tests.data.conftest import write_json_lines
from tests.data.test_batches import SPLITS, global_order

LANES = 12
BLOCK = 16


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_tokenizer(["document 0123456789 has some words"] * 9, 300)
    tokenizer.save_pretrained(folder)
    tokenizer.name_or_path = str(folder)
    return tokenizer


def texts(count: int, name: str = "document") -> list[str]:
    """Of up to 12 words, and one much longer; no word is in two of them."""
    lengths = random.Random(0).choices(range(1, 13), k=count)
    lengths[count // 2] = 100
    return [" ".join(f"{name}{n}.{m}" for m in range(length)) for n, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return str(write_json_lines(tmp_path_factory.mktemp("data") / "a.jsonl", texts(150)))


@pytest.fixture
def open_stream(source, tokenizer):
    settings = {
        "block_size": BLOCK,
        "tokenizer": tokenizer.name_or_path,
        "shuffle_buffer": 40,
        "eval_tokens": 64,
        "global_batch_size": LANES,
        "validation_fraction": 0.1,
    }
    return lambda sources=source, **other: prepare_stream(sources, **(settings | other))


@pytest.fixture(autouse=True, scope="module")
def few_lanes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "LANES", LANES)
        yield


def documents_of(stream: TextStream, lane: int, epochs: int, tokenizer) -> list[list[str]]:
    """The documents that a lane has in each epoch, of a stream of blocks of one token."""
    opened = OpenStream(stream, [lane])
    tokens: list[list[int]] = [[] for _ in range(epochs)]
    for k in range(lane, 1 << 30, stream.lanes):
        block = opened.draw(k)
        epoch = Cursor(*block[CURSOR].tolist()).epoch
        if epoch == epochs:
            return [tokenizer.decode(ids).split("<|endoftext|>")[:-1] for ids in tokens]
        tokens[epoch].append(int(block["input_ids"]))
    raise AssertionError


def test_each_document_is_in_each_epoch_once(source, tokenizer):
    stream = TextStream(
        [open_source(source)], [1], tokenizer, block_size=1, validation_fraction=0.1,
        shuffle_buffer=40, seed=0, lanes=LANES,
    )  # fmt: skip
    lanes = [documents_of(stream, lane, 2, tokenizer) for lane in range(LANES)]
    expected = load_documents(source, split="train", validation_fraction=0.1)
    orders = []
    for epoch in range(2):
        found = [document for lane in lanes for document in lane[epoch]]
        assert Counter(found) == Counter(expected)
        orders.append(found)
        # a lane begins with a document from anywhere in the first window
        firsts = [expected.index(lane[epoch][0]) for lane in lanes]
        assert firsts != sorted(firsts)
        assert max(firsts) < 40
        assert np.std(firsts) > 8
    assert orders[0] != orders[1]


def test_lanes_stay_abreast(source, tokenizer, monkeypatch):
    """Little more is read than what the blocks so far are made of, and never much at once."""
    opened_source = open_source(source)
    rows, count = opened_source.rows, 0

    def counted(*place):
        nonlocal count
        for row in rows(*place):
            count += 1
            yield row

    monkeypatch.setattr(opened_source, "rows", counted)
    stream = TextStream(
        [opened_source], [1], tokenizer, block_size=BLOCK, validation_fraction=1e-9, shuffle_buffer=40,
        seed=0, lanes=4,
    )  # fmt: skip
    opened = OpenStream(stream, range(4))
    tokens_in_epoch = len(tokenize_documents(load_documents(source), tokenizer))
    samples = 20 * tokens_in_epoch // BLOCK
    for k in range(samples):
        before = count
        opened.draw(k)
        if k > samples // 2:
            assert count - before < 30  # of a window of 40
            used = 150 * k * BLOCK / tokens_in_epoch
            assert used < count < used + 4 * 40


def run(
    stream, ranks=1, accumulation=1, batch_size=24, *, steps, workers=0, step=0, state=None
) -> tuple[list[list[int]], dict]:
    """The blocks of some steps in order, and the state after them."""
    make = partial(
        TrainBatches, stream, seed=0, batch_size=batch_size, accumulation=accumulation, step=step,
        state=state,
    )  # fmt: skip
    consumers = [make(rank=rank, ranks=ranks) for rank in range(ranks)]
    rows = []
    for index, batch in enumerate(global_order(make, ranks, steps, accumulation, workers)):
        consumers[index % ranks].consumed(batch)
        assert batch.keys() == {"input_ids", "labels"}
        assert batch["input_ids"].shape == (batch_size, BLOCK)
        rows += batch["input_ids"].tolist()
    states = json.loads(json.dumps([consumer.state_dict() for consumer in consumers]))
    return rows, merge_states(states)


def words_of(rows: list[list[int]], tokenizer) -> set[str]:
    """The words that a run has seen, each of which is of one document."""
    lanes = [tokenizer.decode(list(chain(*rows[lane::LANES]))) for lane in range(LANES)]
    return {word for lane in lanes for word in re.split(" |<.endoftext.>", lane)}


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_samples_do_not_depend_on_ranks_or_workers(open_stream, source, tmp_path, workers, mixed):
    sources = source
    if mixed:
        other = write_json_lines(tmp_path / "b.jsonl", texts(90, "other"))
        sources = [(source, 2), (str(other), 1)]
    stream = open_stream(sources).train
    expected, state = run(stream, steps=8)
    assert len({tuple(row) for row in expected}) > 0.9 * len(expected)
    for split in SPLITS[1:]:
        assert run(stream, *split, steps=8, workers=workers) == (expected, state)


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_resumed_stream_goes_on(stream, uninterrupted, data):
    """In several parts, each with other ranks and workers than the one before."""
    rows, state, step = [], {}, 0
    while step < 12:
        steps = data.draw(st.integers(1, 12 - step))
        split, workers = data.draw(st.sampled_from(SPLITS)), data.draw(st.integers(0, 3))
        part, state = run(stream, *split, steps=steps, workers=workers, step=step, state=state)
        rows += part
        step += steps
    assert rows == uninterrupted


@pytest.fixture(scope="module")
def stream(tokenizer, tmp_path_factory):
    """Mixed, and over several epochs in twelve steps."""
    folder = tmp_path_factory.mktemp("mixed")
    first = write_json_lines(folder / "a.jsonl", texts(25))
    second = write_json_lines(folder / "b.jsonl", texts(20, "other"))
    return prepare_stream(
        [(str(first), 3), (str(second), 2)], block_size=BLOCK, tokenizer=tokenizer.name_or_path,
        shuffle_buffer=20, eval_tokens=32, global_batch_size=LANES, validation_fraction=0.1,
    ).train  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(stream):
    rows, state = run(stream, steps=12)
    assert sum(Cursor(*cursor).epoch > 0 for cursor in state["cursors"]) > LANES
    return rows


def test_mixture_has_its_shares(open_stream, source, tmp_path, tokenizer):
    other = write_json_lines(tmp_path / "b.jsonl", ["1 2 3 " * 30 + str(n) for n in range(90)])
    prepared = open_stream([(source, 3), (str(other), 1)])
    rows, _ = run(prepared.train, steps=20)
    of_other = sum("1 2 3" in tokenizer.decode(row) for row in rows)
    assert abs(of_other - len(rows) / 4) <= 2
    tokens = tokenizer.decode(prepared.validation.tokens)
    assert "1 2 3" in tokens
    assert "document" in tokens


def test_validation_is_held_out(open_stream, source, tokenizer):
    prepared = open_stream(eval_tokens=300)
    held_out = load_documents(source, split="validation", validation_fraction=0.1)
    text = tokenizer.decode(prepared.validation.tokens)
    assert "<|endoftext|>".join(held_out).startswith(text)
    assert len(prepared.validation.tokens) == 300
    rows, _ = run(prepared.train, steps=30)
    trained = words_of(rows, tokenizer)
    assert not trained & set(" ".join(held_out).split())
    assert len(trained) > 700


@pytest.fixture
def encoded(monkeypatch) -> list[str]:
    """Grows by what is tokenised."""
    found: list[str] = []
    original = TextStream.encoder

    def encoder(self):
        encode = original(self)
        return lambda text: [found.append(text), encode(text)][1]

    monkeypatch.setattr(TextStream, "encoder", encoder)
    return found


def test_ranks_and_workers_share_the_tokenising(open_stream, encoded):
    """Where the lanes are a multiple of a step's samples, times the workers at most."""
    stream = open_stream(shuffle_buffer=200).train
    by_part = []
    for rank in range(3):
        for worker in range(2):
            encoded.clear()
            (batches,) = [iter(TrainBatches(stream, seed=0, batch_size=2, rank=rank, ranks=3))]
            info = type("Info", (), {"id": worker, "num_workers": 2})
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("stablemask.data.batches.get_worker_info", lambda info=info: info)
                next(batches), next(batches)
            by_part.append(set(encoded))
    assert all(by_part)
    assert sum(map(len, by_part)) == len(set.union(*by_part))


def test_resuming_tokenises_nothing_of_before(open_stream, encoded, tokenizer):
    stream = open_stream().train
    _, state = run(stream, steps=40)
    encoded.clear()
    run(stream, steps=1, step=40, state=state)
    # the documents that a lane begins and ends in are tokenised whole
    assert 24 * BLOCK < len(tokenize_documents(encoded, tokenizer)) < 0.2 * 40 * 24 * BLOCK


@pytest.fixture(params=["split", "given", "saved"])
def dataset(request, tmp_path) -> str:
    """A dataset in a folder: shards, without and with a validation split, and one saved to the disk."""
    import datasets

    records = texts(150)
    if request.param == "saved":
        made = datasets.Dataset.from_dict({"id": range(150), "text": records})
        datasets.DatasetDict(train=made).save_to_disk(tmp_path / "d")
        return f"hub:{tmp_path / 'd'}"
    for shard in range(3):
        write_json_lines(tmp_path / f"d/train-{shard}.jsonl", ["", *records[50 * shard :][:50]])
    if request.param == "given":
        write_json_lines(tmp_path / "d/validation.jsonl", texts(20, "held"))
    return f"hub:{tmp_path / 'd'}"


def test_dataset(open_stream, dataset, tokenizer):
    prepared = open_stream(dataset)
    rows, _ = run(prepared.train, steps=40)
    first, state = run(prepared.train, 2, 3, 4, steps=29, workers=2)
    second, _ = run(prepared.train, 3, 8, 1, steps=11, step=29, state=state)
    assert first + second == rows
    trained = words_of(rows, tokenizer)
    known = sum(f"document{n}.0" in trained for n in range(150))
    if "held" in tokenizer.decode(prepared.validation.tokens):
        assert known == 150
        assert not any(word.startswith("held") for word in trained)
    else:
        assert 110 < known < 150


def test_dataset_resumes_at_its_shard(open_stream, tmp_path):
    """The shards of before are not opened: nothing of the data can be read any more but the last one."""
    for shard in range(3):
        write_json_lines(tmp_path / f"train-{shard}.jsonl", texts(50, f"part{shard}."))
    (source,) = open_stream(f"hub:{tmp_path}").train.sources
    for shard in range(2):
        (tmp_path / f"train-{shard}.jsonl").unlink()
    rows = list(source.rows("train", 2, 20))
    assert [row.document.text for row in rows] == texts(50, "part2.")[20:]
    assert [row[1:] for row in rows] == [(2, number) for number in range(21, 51)]


@pytest.mark.parametrize("kind", ["file", "shards"])
def test_worker_processes(open_stream, source, tmp_path, kind):
    """In which the library would otherwise deal the shards out itself."""
    if kind == "shards":
        for shard in range(3):
            write_json_lines(tmp_path / f"train-{shard}.jsonl", texts(50, f"part{shard}."))
        source = f"hub:{tmp_path}"
    batches = TrainBatches(open_stream(source).train, seed=0, batch_size=8)
    expected, _ = run(batches.examples, batch_size=8, steps=4)
    iterator = iter(loader(batches, workers=2))
    assert [row for _ in range(4) for row in next(iterator)["input_ids"].tolist()] == expected


def test_key(open_stream, source, tmp_path):
    first = open_stream().key
    assert open_stream().key == first
    for other in (
        {"seed": 1},
        {"block_size": 8},
        {"global_batch_size": 13},
        {"shuffle_buffer": 41},
    ):
        assert open_stream(**other).key != first
    changed = tmp_path / "a.jsonl"
    with open(source) as lines:
        changed.write_text(lines.read().replace("document", "ducoment"))
    assert open_stream(str(changed)).key != first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer": None}, "name one: --tokenizer"),
        ({"global_batch_size": 200}, "documents to train on, where at least 200"),
        ({"block_size": 10**6}, "too short to stream"),
        ({"block_size": 3000, "validation_fraction": 0.01}, "less than a block of 3000"),
        ({"text_column": "body"}, "no column 'body'"),
        ({"sources": "hub:/nowhere"}, "neither a folder nor a name"),
        ({"sources": "hub:owner/name"}, "cannot reach http://127.0.0.1:9"),
        ({"sources": "/nowhere"}, "no file or folder"),
    ],
)
def test_what_cannot_be_streamed(open_stream, change, message):
    with pytest.raises(InputError, match=message):
        open_stream(**change)


def test_damaged_dataset(open_stream, tmp_path):
    data = gzip.compress(b"".join(json.dumps({"text": t}).encode() + b"\n" for t in texts(50)))
    (tmp_path / "d").mkdir()
    (tmp_path / "d/train.jsonl.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="hub:"):
        open_stream(f"hub:{tmp_path / 'd'}")
    write_json_lines(tmp_path / "e/train.jsonl", texts(50), column="body")
    with pytest.raises(InputError, match="no column 'text'; the columns are: body, id"):
        open_stream(f"hub:{tmp_path / 'e'}")


def test_source_that_shrinks_to_nothing(tmp_path, tokenizer):
    """Between its check and its reading, or with another file system on another node."""
    path = write_json_lines(tmp_path / "a.jsonl", texts(50))
    stream = TextStream(
        [open_source(str(path))], [1], tokenizer, block_size=4, validation_fraction=1 - 1e-9,
        shuffle_buffer=4, seed=0, lanes=4,
    )  # fmt: skip
    with pytest.raises(InputError, match="no document to train on"):
        OpenStream(stream, range(4)).draw(0)
