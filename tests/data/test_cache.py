"""The cache of corpora: entries are whole or absent, whatever kills, fills or damages."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from stablemask.data import prepare_corpus, train_tokenizer
from stablemask.data.cache import TokenFile
from stablemask.errors import InputError

from ..test_reading import DEEP, unreadable_paths
from .conftest import SMALL, entries, write_json_lines

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
    assert len(entries(tmp_path / "shared")) == 2


def damage(cache: Path, name: str, size: int | None) -> None:
    (path,) = cache.glob(f"*/{name}")
    path.unlink() if size is None else os.truncate(path, size)


@pytest.mark.parametrize("content", ["[]", "{}", DEEP, '{"train": 1}', None])
def test_an_entry_that_says_nothing_of_use_is_rebuilt(text_folder, caches, read, content):
    first = prepare_corpus(str(text_folder), **SMALL)
    (path,) = caches.glob("*/meta.json")
    if content is None:
        path.unlink()
        path.mkdir()
    else:
        path.write_text(content)
    read.clear()
    assert prepare_corpus(str(text_folder), **SMALL).key == first.key
    assert len(read) == 1


def test_a_folder_that_cannot_be_made_is_named(text_folder, tmp_path):
    paths = unreadable_paths(tmp_path)
    for reason in ("Not a directory", "symbolic links", "name too long"):
        path = paths[reason] / "tokens"
        with pytest.raises(
            InputError, match=rf"cannot keep tokens in '{path}': .*STABLEMASK_CACHE"
        ):
            prepare_corpus(str(text_folder), cache_dir=path, **SMALL)


@pytest.mark.parametrize("refused", ["mkdir", "open"])
def test_a_disk_that_is_only_read_is_named(text_folder, tmp_path, monkeypatch, refused):
    """No folder can be made there, or one that is there takes no file."""

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(*{"mkdir": (Path, "mkdir"), "open": (FileLock, "acquire")}[refused], refuse)
    with pytest.raises(InputError, match=r"cannot keep tokens in .*Read-only file system"):
        prepare_corpus(str(text_folder), cache_dir=tmp_path / "disk", **SMALL)


@pytest.mark.parametrize(
    ("name", "size", "reads"),
    [
        ("train.npy", 1000, 1),
        ("validation.npy", 0, 1),
        ("validation.npy", None, 1),
        ("meta.json", 50, 1),
        ("meta.json", None, 1),
        ("tokenizer.json", 1000, 1),
        ("tokenizer_config.json", None, 1),
    ],
)
def test_damaged_entry_is_rebuilt(text_folder, caches, read, name, size, reads):
    first = prepare_corpus(str(text_folder), **SMALL)
    tokens = np.array(first.train.tokens)
    read.clear()
    damage(caches, name, size)
    again = prepare_corpus(str(text_folder), **SMALL)
    assert again.key == first.key
    assert np.array_equal(again.train.tokens, tokens)
    assert len(read) == reads


def test_remains_of_a_killed_run_do_not_matter(text_folder, caches, tmp_path):
    prepare_corpus(str(text_folder), cache_dir=tmp_path / "other", **SMALL)
    names = sorted(path.name for path in entries(tmp_path / "other"))
    for name in names:
        (caches / f"{name}.tmp").mkdir(parents=True)
        (caches / f"{name}.tmp" / "train.npy").write_bytes(b"half")
    prepare_corpus(str(text_folder), **SMALL)
    assert sorted(path.name for path in entries(caches)) == names


KILLED = """
import os, signal, sys
from stablemask.data import corpus
finish = corpus.TokenFile.append
def append(self, tokens):
    finish(self, tokens)
    os.kill(os.getpid(), signal.SIGKILL)
corpus.TokenFile.append = append
corpus.prepare_corpus(sys.argv[1], block_size=16, vocab_size=300)
"""


def test_a_killed_preparation_leaves_no_entry(text_folder, python, caches):
    process = python(KILLED, text_folder)
    process.communicate(timeout=60)
    assert process.returncode == -9
    assert entries(caches, "train.npy")[0].suffix == ".tmp"
    prepare_corpus(str(text_folder), **SMALL)
    assert [path.suffix for path in entries(caches, "train.npy")] == [""]


LIMITED = """
import errno, os, resource, sys
from pathlib import Path
import torch, transformers
from stablemask.data import prepare_corpus
for limit in (1000, 5000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    for tokenizer in (None, sys.argv[2]):
        try:
            prepare_corpus(sys.argv[1], block_size=16, vocab_size=400, tokenizer=tokenizer)
        except OSError as error:
            folders = [path.name for path in Path(sys.argv[3]).iterdir() if path.is_dir()]
            print(limit, tokenizer is not None, errno.errorcode[error.errno], folders)
"""


def test_full_disk_leaves_nothing(tmp_path, python, caches):
    """The kernel refuses to write past a limit, as it does on a full disk."""
    path = write_json_lines(tmp_path / "a.jsonl", [f"document {n} counts" for n in range(3000)])
    train_tokenizer(["text"], 300).save_pretrained(tmp_path / "tokenizer")
    process = python(LIMITED, path, tmp_path / "tokenizer", caches)
    output, errors = process.communicate(timeout=60)
    assert output.splitlines() == [
        f"{limit} {given} EFBIG []" for limit in (1000, 5000) for given in (False, True)
    ], errors


def test_interrupt_leaves_nothing(text_folder, caches, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(TokenFile, "append", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(str(text_folder), **SMALL)
    assert entries(caches, "train.npy") == []


def test_a_file_of_tokens_grows(tmp_path):
    parts = [np.arange(n, n + 100, dtype=np.uint16) for n in range(0, 1000, 100)]
    with TokenFile(tmp_path / "a.npy", np.dtype(np.uint16)) as file:
        for part in parts:
            file.append(part)
    assert np.array_equal(np.load(tmp_path / "a.npy", mmap_mode="r"), np.arange(1000))
    assert file.size == 1000
    np.save(tmp_path / "b.npy", np.concatenate(parts))
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()
