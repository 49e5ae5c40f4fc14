import errno
import os
from pathlib import Path

import numpy as np
import pytest

from stablemask.data import corpus, load_documents, prepare_corpus, train_tokenizer
from stablemask.errors import InputError
from tests import marks


def entries(cache: Path) -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir()]


@pytest.fixture
def tokenized(monkeypatch) -> list[int]:
    """Grows by one for each call of ``tokenize_documents``."""
    calls: list[int] = []
    original = corpus.tokenize_documents

    def count(documents, tokenizer):
        calls.append(len(documents))
        return original(documents, tokenizer)

    monkeypatch.setattr(corpus, "tokenize_documents", count)
    return calls


def test_builtin(caches, tokenized):
    first = prepare_corpus("builtin", block_size=256)
    assert len(first.tokenizer) == 4096
    assert isinstance(first.train.tokens, np.memmap)
    assert first.train.tokens.dtype == np.uint16
    assert len(first.train) > 5 * len(first.validation) > 0
    block = first.train[len(first.train) - 1]["input_ids"]
    assert block.shape == (256,)

    validation = load_documents("builtin", split="validation")
    text = first.tokenizer.decode(np.asarray(first.validation.tokens))
    assert text == "".join(document + "<|endoftext|>" for document in validation)

    second = prepare_corpus("builtin", block_size=512)  # shares the entry
    assert len(tokenized) == 2
    assert second.key == first.key
    assert [path.name for path in entries(caches)] == [first.key]
    assert second.validation[0]["input_ids"][256:].equal(first.validation[1]["input_ids"])


@marks.wikitext
def test_wikitext():
    prepared = prepare_corpus(str(marks.WIKITEXT), block_size=128, vocab_size=2048)
    text = marks.WIKITEXT.read_text()
    parts = [
        prepared.tokenizer.decode(np.asarray(split.tokens)[:-1])
        for split in (prepared.train, prepared.validation)
    ]
    assert "".join(parts) == text
    assert parts[0].endswith("\n")
    assert 0.04 < len(parts[1]) / len(text) <= 0.05


def test_key_covers_content_and_settings(text_folder, tmp_path):
    def key(**options) -> str:
        return prepare_corpus(
            str(text_folder), **{"block_size": 16, "vocab_size": 300} | options
        ).key

    first = key()
    assert key(block_size=32) == first
    assert key(vocab_size=301) != first
    assert key(validation_fraction=0.3) != first
    train_tokenizer(["other text"], 300).save_pretrained(tmp_path / "tokenizer")
    existing = key(tokenizer=str(tmp_path / "tokenizer"))
    assert existing != first
    train_tokenizer(["yet another text"], 300).save_pretrained(tmp_path / "tokenizer")
    assert key(tokenizer=str(tmp_path / "tokenizer")) not in (first, existing)
    path = next(text_folder.rglob("*.txt"))
    path.write_text(path.read_text() + "!")
    assert key() != first


def test_existing_tokenizer_is_used(text_folder, tmp_path, tokenized):
    tokenizer = train_tokenizer(["other text " * 9], 280)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for _ in range(2):
        prepared = prepare_corpus(
            str(text_folder), block_size=16, tokenizer=str(tmp_path / "tokenizer")
        )
        assert prepared.tokenizer.get_vocab() == tokenizer.get_vocab()
        assert prepared.tokenizer.chat_template == tokenizer.chat_template
    assert len(tokenized) == 2


PREPARE = """
import sys
from stablemask.data import prepare_corpus
corpus = prepare_corpus(sys.argv[1], block_size=16, vocab_size=400, cache_dir=sys.argv[2])
print(corpus.key, corpus.train.tokens.tobytes().hex(), corpus.validation.tokens.tobytes().hex())
"""


def test_processes_agree_and_share(python, text_folder, tmp_path):
    """Two at once into one cache, one into another, each with its own hash seed."""
    processes = [
        python(PREPARE, text_folder, tmp_path / cache, PYTHONHASHSEED=seed)
        for cache, seed in (("shared", "1"), ("shared", "2"), ("own", "3"))
    ]
    outputs = {process.communicate(timeout=120) for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert len({output for output, _ in outputs}) == 1
    assert len(entries(tmp_path / "shared")) == 1


def damage_by_truncation(entry: Path) -> None:
    file = entry / "train.npy"
    os.truncate(file, file.stat().st_size // 2)


def damage_by_emptying(entry: Path) -> None:
    os.truncate(entry / "validation.npy", 0)


def damage_of_tokenizer(entry: Path) -> None:
    os.truncate(entry / "tokenizer/tokenizer.json", 1000)


def damage_by_loss(entry: Path) -> None:
    (entry / "validation.npy").unlink()


@pytest.mark.parametrize(
    "damage", [damage_by_truncation, damage_by_emptying, damage_of_tokenizer, damage_by_loss]
)
def test_damaged_entry_is_rebuilt(text_folder, caches, tokenized, damage):
    options = {"block_size": 16, "vocab_size": 300}
    first = prepare_corpus(str(text_folder), **options)
    tokens = np.array(first.train.tokens)
    damage(caches / first.key)
    again = prepare_corpus(str(text_folder), **options)
    assert again.key == first.key
    assert np.array_equal(again.train.tokens, tokens)
    assert len(tokenized) == 4


def test_remains_of_a_killed_run_do_not_matter(text_folder, caches, tmp_path):
    options = {"block_size": 16, "vocab_size": 300}
    key = prepare_corpus(str(text_folder), cache_dir=tmp_path / "other", **options).key
    unfinished = caches / f"{key}.tmp"
    unfinished.mkdir(parents=True)
    (unfinished / "train.npy").write_bytes(b"half")
    prepare_corpus(str(text_folder), **options)
    assert [path.name for path in entries(caches)] == [key]


def test_full_disk_leaves_nothing(text_folder, python, caches):
    """The kernel refuses to write past a limit, as it does on a full disk."""
    limit = """
import resource, sys
import torch, transformers, stablemask.data.corpus as corpus
written = corpus._save_{what}
def save(*arguments):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        written(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
corpus._save_{what} = save
try:
    corpus.prepare_corpus(sys.argv[1], block_size=16, vocab_size=400)
except OSError as error:
    print(error.errno)
"""
    for what in ("array", "tokenizer"):
        process = python(limit.format(what=what), text_folder)
        output, errors = process.communicate(timeout=60)
        assert output.split() == [str(errno.EFBIG)], errors
        assert entries(caches) == []


def test_interrupt_leaves_nothing(text_folder, caches, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "_save_tokenizer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(str(text_folder), block_size=16, vocab_size=300)
    assert entries(caches) == []


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
        prepare_corpus(str(source), **{"block_size": 16, "vocab_size": 300} | options)
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
    assert not caches.exists()
