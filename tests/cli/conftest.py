"""A tiny saved model and a text, as a user would have them after a training run."""

from pathlib import Path

import pytest
import torch

from stablemask.data import train_tokenizer

from ..models.tiny import tiny_model

TEXT = "the quick brown fox jumps over the lazy dog\n" * 200


def save_model(folder: Path, **overrides) -> str:
    torch.manual_seed(0)
    tokenizer = train_tokenizer([TEXT], 280)
    model = tiny_model(vocab_size=len(tokenizer), **overrides)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def learned_folder(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("learned"), position_encoding="learned")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return str(path)
