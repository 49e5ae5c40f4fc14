import asyncio
import gc
import gzip
import os
import shutil
import sysconfig
import weakref
from pathlib import Path

import numpy as np
import pytest

from stablemask.data import (
    corpus,
    load_documents,
    prepare_corpus,
    prepare_mixture,
    tokenize_documents,
    train_tokenizer,
)
from stablemask.data.mixture import WINDOW
from stablemask.data.sources import Source
from stablemask.data.splitting import Document
from stablemask.errors import InputError

from .conftest import SMALL, entries, sides_of, write_json_lines


def test_builtin(caches, read, monkeypatch):
    # A part of the library, or it would take a while.
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(Path(asyncio.__file__).parent))
    first = prepare_corpus("builtin", block_size=256)
    assert len(first.tokenizer) == 4096
    assert isinstance(first.train.tokens, np.memmap)
    assert first.train.tokens.dtype == np.uint16
    assert len(first.train) > 5 * len(first.validation) > 0
    assert first.num_train_tokens == first.train.num_tokens == len(first.train.tokens)
    block = first.train[len(first.train) - 1]["input_ids"]
    assert block.shape == (256,)
    assert read == ["builtin"] * 2  # to train the tokenizer, and to tokenise

    second = prepare_corpus("builtin", block_size=512)  # shares the result
    assert read == ["builtin"] * 2
    assert second.key == first.key
    assert len(entries(caches)) == 2
    assert second.validation[0]["input_ids"][256:].equal(first.validation[1]["input_ids"])

    validation = load_documents("builtin", split="validation")
    text = first.tokenizer.decode(np.asarray(first.validation.tokens))
    assert text == "".join(document + "<|endoftext|>" for document in validation)


@pytest.mark.parametrize("seen", [1.0, 0.5], ids=["whole", "half"])
def test_tokens_are_those_of_the_documents(tmp_path, records, monkeypatch, seen):
    """Of the documents held in memory and tokenised at once, by a tokenizer trained in memory."""
    path = write_json_lines(tmp_path / "a.jsonl", records)
    monkeypatch.setattr(corpus, "TOKENIZER_BYTES", path.stat().st_size * seen)
    prepared = prepare_corpus(str(path), **SMALL)
    sides = sides_of(str(path))
    expected = train_tokenizer(sides[0], 300)
    assert (prepared.tokenizer.get_vocab() == expected.get_vocab()) is (seen == 1)
    for texts, tokens in zip(sides, (prepared.train, prepared.validation), strict=True):
        assert np.array_equal(tokens.tokens, tokenize_documents(texts, prepared.tokenizer))


def test_key_is_of_the_tokens(text_folder, tmp_path):
    def key(source=text_folder, **options) -> str:
        return prepare_corpus(str(source), **SMALL | options).key

    first = key()
    assert key(block_size=32) == first
    assert key(vocab_size=301) != first
    assert key(validation_fraction=0.3) != first
    train_tokenizer(["other text"], 300).save_pretrained(tmp_path / "tokenizer")
    existing = key(tokenizer=str(tmp_path / "tokenizer"))
    assert existing != first
    train_tokenizer(["yet another text"], 300).save_pretrained(tmp_path / "tokenizer")
    assert key(tokenizer=str(tmp_path / "tokenizer")) not in (first, existing)

    assert key(shutil.copytree(text_folder, tmp_path / "copy")) == first
    for path in (tmp_path / "copy").rglob("*.txt"):
        os.utime(path, (1, 1))
    assert key(tmp_path / "copy") == first
    path = next(text_folder.rglob("*.txt"))
    path.write_text(path.read_text() + "!")
    assert key() != first


def test_what_has_changed_is_read_again(text_folder, tmp_path, read):
    prepare_corpus(str(text_folder), **SMALL)
    read.clear()
    prepare_corpus(str(text_folder), **SMALL)
    assert read == []
    path = next(text_folder.rglob("*.txt"))
    changes = [
        lambda: path.write_text(path.read_text().replace("counts", "COUNTS")),  # of equal size
        lambda: path.rename(path.with_name("renamed.txt")),
        lambda: (text_folder / "new.txt").write_text("one more"),
    ]
    for change in changes:
        change()
        prepare_corpus(str(text_folder), **SMALL)
        assert read
        read.clear()


@pytest.mark.parametrize("saved", [False, True], ids=["files", "save_to_disk"])
def test_a_dataset_that_has_changed_is_read_again(tmp_path, records, read, saved):
    import datasets

    def write(texts):
        if saved:
            datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "set"))
        else:
            write_json_lines(tmp_path / "set/train.jsonl", texts)

    write(records)
    keys = [prepare_corpus(f"hub:{tmp_path / 'set'}", **SMALL).key for _ in range(2)]
    assert len(read) == 2
    write([*records, "one more"])
    keys.append(prepare_corpus(f"hub:{tmp_path / 'set'}", **SMALL).key)
    assert keys[0] == keys[1] != keys[2]


class Text(str):
    """Text that can be referred to weakly."""

    __slots__ = ("__weakref__",)


class ManyDocuments(Source):
    """Counts how many of its documents are in memory at once."""

    num_bytes = 1

    def __init__(self):
        super().__init__("many", "text")
        self.alive: weakref.WeakSet[Text] = weakref.WeakSet()
        self.most = 0

    def fingerprint(self):
        yield "many"

    def _read(self):
        for number in range(1000):
            text = Text(f"document {number} " + "na " * 200)
            self.alive.add(text)
            self.most = max(self.most, len(self.alive))
            yield Document(text, str(number))


def test_documents_are_not_held(monkeypatch):
    from stablemask.data import packing

    source = ManyDocuments()
    monkeypatch.setattr(corpus, "open_source", lambda *_: source)
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 10_000)
    gc.collect()
    prepared = prepare_corpus("many", **SMALL)
    assert np.count_nonzero(prepared.train.tokens == 0) > 900
    assert source.most < 200  # one at a time, once each side has one


class Bar:
    """Stands in for tqdm."""

    def __init__(self):
        self.n, self.total, self.totals = 0, None, []

    def update(self, n):
        self.n += n
        self.totals.append(self.total)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt"])
def test_progress_foresees_its_end(tmp_path, monkeypatch, name):
    from stablemask.data import packing

    texts = [os.urandom(50).hex() + "\n" for _ in range(2000)]
    path = write_json_lines(tmp_path / "a.jsonl", texts)
    if name == "a.jsonl.gz":
        (tmp_path / name).write_bytes(gzip.compress(path.read_bytes()))
    elif name == "a.txt":
        (tmp_path / name).write_text("".join(texts))
    bar = Bar()
    monkeypatch.setattr(corpus, "progress_bar", lambda total: bar)
    monkeypatch.setattr(packing, "BATCH_CHARACTERS", 10_000)
    prepare_corpus(str(tmp_path / name), **SMALL)
    characters = sum(map(len, texts))
    assert bar.n == bar.total == characters
    assert len(bar.totals) > 9
    assert all(0.5 < total / characters < 2 for total in bar.totals[3:])


def test_existing_tokenizer_is_used(text_folder, tmp_path, read):
    tokenizer = train_tokenizer(["other text " * 9], 280)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for _ in range(2):
        prepared = prepare_corpus(
            str(text_folder), block_size=16, tokenizer=str(tmp_path / "tokenizer")
        )
        assert prepared.tokenizer.get_vocab() == tokenizer.get_vocab()
        assert prepared.tokenizer.chat_template == tokenizer.chat_template
    assert len(read) == 1


# Mixtures


@pytest.fixture
def mixture(tmp_path) -> list[str]:
    for name in ("a", "b=c"):
        write_json_lines(tmp_path / f"{name}.jsonl", [f"{name} {n} is {n * n}" for n in range(400)])
    return [f"{tmp_path / 'a.jsonl'}=3", f"{tmp_path / 'b=c.jsonl'}=1"]


def test_a_mixture_is_of_its_sources(mixture, tmp_path, read):
    mixed = prepare_mixture(mixture, **SMALL)
    paths = [item.rpartition("=")[0] for item in mixture]
    assert read == paths * 2
    texts = [sides_of(path) for path in paths]
    expected = train_tokenizer([text for train, _ in texts for text in train], 300)
    assert mixed.tokenizer.get_vocab() == expected.get_vocab()
    for dataset, (train, _) in zip(mixed.train.datasets, texts, strict=True):
        assert np.array_equal(dataset.tokens, tokenize_documents(train, expected))
    validation = [text for _, held_out in texts for text in held_out]
    assert np.array_equal(mixed.validation.tokens, tokenize_documents(validation, expected))
    assert isinstance(mixed.validation.tokens, np.memmap)
    assert mixed.num_train_tokens == sum(len(d.tokens) for d in mixed.train.datasets)
    assert mixed.train.weights == [0.75, 0.25]

    read.clear()
    mixed.tokenizer.save_pretrained(tmp_path / "tokenizer")
    options = {**SMALL, "tokenizer": str(tmp_path / "tokenizer")}
    assert prepare_mixture(mixture, **SMALL).key == mixed.key
    assert prepare_mixture(mixture, **options).key == mixed.key
    prepare_corpus(paths[1], **options)
    assert read == []  # the same tokenizer, the same tokens


def test_key_of_a_mixture(mixture):
    def key(*weights, **options) -> str:
        items = [f"{item.rpartition('=')[0]}={w}" for item, w in zip(mixture, weights, strict=True)]
        return prepare_mixture(items, **SMALL | options).key

    assert key(3, 1) == key(0.75, 0.25) == key(3, 1, seed=1) == key(3, 1, block_size=32)
    assert key(3, 1) != key(1, 3)


def test_samples_of_a_mixture_come_from_its_sources(mixture):
    """Every block of each source once before any comes again."""
    train = prepare_mixture(mixture, **SMALL).train
    drawn = [train.locate(k) for k in range(WINDOW)]
    for source in range(2):
        numbers = [n for s, n in drawn if s == source]
        assert numbers == list(range(train.counts[source]))


@pytest.mark.parametrize(
    ("items", "parts"),
    [
        ([], ["a mixture is empty", "SOURCE=WEIGHT"]),
        (["builtin"], ["'builtin'", "SOURCE=WEIGHT"]),
        (["=1"], ["'=1'"]),
        (["builtin=0"], ["'builtin=0'", "greater than 0"]),
        (["builtin=-1"], ["'builtin=-1'"]),
        (["builtin=nan"], ["'builtin=nan'"]),
        (["builtin=inf"], ["'builtin=inf'"]),
        (["builtin=1", "builtin=2"], ["'builtin' twice"]),
        (["builtin=1", "a.txt=0.00001"], ["'a.txt'", "10,000"]),
        (["builtin=1", "none.txt=1"], ["none.txt", "no file or folder"]),
    ],
)
def test_bad_mixtures(items, parts, caches):
    with pytest.raises(InputError) as info:
        prepare_mixture(items, **SMALL)
    assert "\n" not in str(info.value)
    for part in parts:
        assert part in str(info.value)
    assert not caches.exists()


# What is refused or filled up


def test_short_validation_takes_from_the_end_of_training(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {number}\n" for number in range(200)))
    large = prepare_corpus(str(path), block_size=8, vocab_size=300)
    small = prepare_corpus(str(path), block_size=256, vocab_size=300)
    assert len(large.validation.tokens) < 256
    assert len(small.validation.tokens) == 256
    assert len(small.validation) == 1
    joined = [np.concatenate([c.train.tokens, c.validation.tokens]) for c in (small, large)]
    assert np.array_equal(*joined)


def refused(source: object, *parts: str, **options) -> None:
    with pytest.raises(InputError) as info:
        prepare_corpus(str(source), **SMALL | options)
    assert "\n" not in str(info.value)
    for part in parts:
        assert part in str(info.value)


@pytest.mark.parametrize("text", ["x", "ab\n", "a few words\nof text\n"])
def test_text_shorter_than_two_blocks(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    refused(tmp_path / "a.txt", "a.txt", "too short", "characters", "block size of at most")


def test_too_short_names_what_would_do(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {number}\n" for number in range(50)))
    with pytest.raises(InputError) as info:
        prepare_corpus(str(path), block_size=512, vocab_size=300)
    largest = int(str(info.value).split()[-1])
    prepare_corpus(str(path), block_size=largest, vocab_size=300)
    refused(path, f"at most {largest}", block_size=largest + 1)


def test_settings(text_folder, caches, tmp_path):
    refused(text_folder, "block size 1 ", block_size=1)
    refused(text_folder, "vocabulary size 256 ", vocab_size=256)
    refused(text_folder, "tokenizer", "no such folder", tokenizer=str(tmp_path / "none"))
    refused(tmp_path / "none.txt", "none.txt")
    refused(text_folder, "validation fraction 2", validation_fraction=2)
    assert not caches.exists()
