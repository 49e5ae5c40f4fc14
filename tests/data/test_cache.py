"""The cache of corpora: entries are whole or absent, whatever kills, fills or damages."""

import errno
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from stablemask.data import prepare_corpus, train_tokenizer
from stablemask.data.cache import TokenFile
from stablemask.errors import InputError

from ..test_reading import DEEP, unreadable_paths
from .conftest import SMALL, entries, fork, write_json_lines

PREPARE = """
import sys
from stablemask.data import prepare_corpus
print(prepare_corpus(sys.argv[1], block_size=16, vocab_size=300, cache_dir=sys.argv[2]).key)
"""


def test_processes_agree_and_share(python, text_folder, caches, tmp_path):
    """Two at once into one cache, and one of another hash seed into another."""
    children = [fork(lambda: prepare_corpus(str(text_folder), **SMALL)) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    assert len(entries(caches)) == 2
    output, errors = python(PREPARE, text_folder, tmp_path / "own", PYTHONHASHSEED="1")
    assert output.strip() == prepare_corpus(str(text_folder), **SMALL).key, errors


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.bin", 1000),
        ("validation.bin", 0),
        ("validation.bin", None),
        ("tokenizer.json", 1000),
        ("tokenizer_config.json", None),
        ("meta.json", 50),
        ("meta.json", None),
        ("meta.json", "a folder"),
        *(("meta.json", text) for text in (b"[]", b"{}", DEEP.encode(), b'{"train": 1}')),
    ],
)
def test_damaged_entry_is_rebuilt(text_folder, caches, read, name, content):
    first = prepare_corpus(str(text_folder), **SMALL)
    tokens = np.array(first.train.tokens)
    read.clear()
    (path,) = caches.glob(f"*/{name}")
    if isinstance(content, int):
        os.truncate(path, content)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.unlink()
        if content is not None:
            path.mkdir()
    again = prepare_corpus(str(text_folder), **SMALL)
    assert again.key == first.key
    assert np.array_equal(again.train.tokens, tokens)
    assert len(read) == 1


def test_a_folder_that_cannot_be_made_is_named(text_folder, tmp_path):
    paths = unreadable_paths(tmp_path)
    for reason in ("Not a directory", "symbolic links", "name too long"):
        path = paths[reason] / "tokens"
        with pytest.raises(
            InputError, match=rf"cannot keep tokens in '{path}': .*STABLEMASK_CACHE"
        ):
            prepare_corpus(str(text_folder), cache_dir=path, **SMALL)


@pytest.mark.parametrize("refused", [(Path, "mkdir"), (FileLock, "acquire")])
def test_a_disk_that_is_only_read_is_named(text_folder, tmp_path, monkeypatch, refused):
    """No folder can be made there, or one that is there takes no file."""

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(*refused, refuse)
    with pytest.raises(InputError, match=r"cannot keep tokens in .*Read-only file system"):
        prepare_corpus(str(text_folder), cache_dir=tmp_path / "disk", **SMALL)


def test_a_killed_preparation_leaves_no_entry(text_folder, caches, monkeypatch):
    def killed() -> None:
        finish = TokenFile.append

        def append(self, tokens):
            finish(self, tokens)
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(TokenFile, "append", append)
        prepare_corpus(str(text_folder), **SMALL)

    assert os.waitpid(fork(killed), 0)[1] == signal.SIGKILL
    assert entries(caches, "train.bin")[0].suffix == ".tmp"
    prepare_corpus(str(text_folder), **SMALL)
    assert [path.suffix for path in entries(caches, "train.bin")] == [""]


@pytest.mark.parametrize(("limit", "given"), [(1000, False), (5000, False), (50_000, True)])
def test_full_disk_leaves_nothing(tmp_path, caches, limit, given):
    """The kernel refuses to write past a limit, as it does on a full disk: a tokenizer, or tokens."""
    path = write_json_lines(tmp_path / "a.jsonl", [f"document {n} counts" for n in range(3000)])
    train_tokenizer(["text"], 300).save_pretrained(tmp_path / "tokenizer")

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match=r".") as info:
            prepare_corpus(
                str(path), **SMALL, tokenizer=str(tmp_path / "tokenizer") if given else None
            )
        assert info.value.errno == errno.EFBIG

    assert os.waitpid(fork(limited), 0)[1] == 0
    assert entries(caches) == []


def test_interrupt_leaves_nothing(text_folder, caches, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(TokenFile, "append", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(str(text_folder), **SMALL)
    assert entries(caches, "train.bin") == []
