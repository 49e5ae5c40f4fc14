"""Which token is put in front, and what teacher and student then read."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stablemask.data import load_tokenizer
from stablemask.training.adapting.prefix import TEXTS, candidates, choose_prefix, sample_text
from stablemask.training.adapting.reading import Reading, Texts, front_tokens, in_front


class Prefers(nn.Module):
    """Knows the next token, the one above the last, the better the first token suits it."""

    def __init__(self, sharpness: dict[int, float]) -> None:
        super().__init__()
        self.sharpness, self.device = sharpness, torch.device("cpu")
        self.table = nn.Embedding(300, 1)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.table

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        sharpness = self.sharpness.get(int(input_ids[0, 0]), 1.0)
        return SimpleNamespace(logits=sharpness * torch.eye(300)[(input_ids + 1) % 300])


@pytest.mark.parametrize(
    ("sharpness", "chosen"),
    [
        ({0: 5.0, 60: 9.0}, "<"),
        ({0: 5.0, 60: 5.0, 1: 5.1}, "<|endoftext|>"),
        ({0: 5.0, 60: 5.0, 1: 9.0}, "<other>"),  # no text begins with it: it must be much better
        ({0: 0.5, 60: 0.5}, ""),
    ],
)
def test_the_candidate_after_which_the_loss_is_lowest_is_chosen(sharpness, chosen, base):
    tokenizer = load_tokenizer(str(base))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<other>"]})
    first_of_template = tokenizer("<")["input_ids"][0]
    other = tokenizer.convert_tokens_to_ids("<other>")
    ids = {0: 0, 60: first_of_template, 1: other}
    model: Any = Prefers({ids[key]: value for key, value in sharpness.items()})
    assert candidates(model, tokenizer) == ([0, first_of_template], [other])
    found = choose_prefix(model, tokenizer, torch.arange(100, 130).view(2, 15))
    assert found.text == chosen
    assert (found.token is None) == (not chosen)
    assert found.losses.keys() == {"", "<|endoftext|>", "<", "<other>"}
    assert found.text in str(found)


def test_there_is_text_to_try_candidates_on(base):
    text = sample_text(load_tokenizer(str(base)), 40)
    assert text.shape == (TEXTS, 40)


def test_the_teacher_reads_the_prefix_in_front_unless_it_is_there():
    ids = torch.tensor([[7, 1, 2], [5, 3, 4]])
    reading = Reading.of(ids, 5)
    assert reading.teacher[0].tolist() == [5, 7, 1, 2]
    assert reading.teacher[1, :3].tolist() == [5, 3, 4]
    assert reading.rows(reading.teacher).tolist() == ids.tolist()
    assert reading.rows(reading.teacher[:, None], dim=2).tolist() == ids[:, None].tolist()
    without = Reading.of(ids, None)
    assert without.rows(without.teacher) is ids


def test_texts_have_the_front_that_their_tokenizer_gives_them():
    data = Texts(np.array([[7, 8, 9], [1, 8, 9]], np.int32), [1])
    assert data[0]["input_ids"].tolist() == [1, 7, 8, 9]
    assert data[0]["labels"].tolist() == [-100, 7, 8, 9]
    assert data[1]["input_ids"].tolist() == [1, 8, 9]
    example = {"input_ids": torch.tensor([3]), "labels": torch.tensor([3])}
    assert in_front([], example) is example


def test_the_front_of_a_tokenizer_is_found(base):
    tokenizer = load_tokenizer(str(base))
    assert front_tokens(tokenizer) == []

    def begins(text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [0] * add_special_tokens + [65]}

    assert front_tokens(begins) == [0]  # type: ignore[arg-type]
