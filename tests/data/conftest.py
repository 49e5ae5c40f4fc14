import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from stablemask.data import load_documents
from stablemask.data.sources import Source

SMALL = {"block_size": 16, "vocab_size": 300}


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """No test reads or fills the caches of the user, or reaches the network."""
    import datasets
    import huggingface_hub

    monkeypatch.setenv("STABLEMASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "cache"


@pytest.fixture
def text_folder(tmp_path) -> Path:
    """Sixty text files, two folders deep, of a few thousand characters in all."""
    folder = tmp_path / "texts"
    for number in range(60):
        path = folder / f"part{number % 3}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"Document {number} counts.\nThen it squares: {number**2}.\n" * 3)
    return folder


@pytest.fixture
def records() -> list[str]:
    return [f"record {number}: " + "na " * (number % 7) + "end" for number in range(200)]


def write_json_lines(path: Path, texts: list[str], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"id": number, column: text}) for number, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n")
    return path


def sides_of(source: object, **options) -> tuple[list[str], list[str]]:
    """The training and the validation documents of a source."""
    train, validation = (
        load_documents(str(source), split=side, **options) for side in ("train", "validation")
    )
    return train, validation


def entries(cache: Path, holding: str = "") -> list[Path]:
    return [path for path in cache.iterdir() if path.is_dir() and (path / holding).exists()]


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of the sources whose documents are read, each time they are."""
    names: list[str] = []
    original = Source.documents

    def documents(self):
        names.append(self.name)
        return original(self)

    monkeypatch.setattr(Source, "documents", documents)
    return names


def fork(work: Callable[[], object]) -> int:
    """The process id of a child that does ``work`` and ends, with 0 unless that raises."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


@pytest.fixture
def python(caches):
    """Run ``code`` in another interpreter; returns what it prints, and its errors."""

    def run(code: str, *arguments: object, **environment: str) -> tuple[str, str]:
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        return done.stdout, done.stderr

    return run
