"""The learning rate by step: Transformers' where it has the same, and a line worked out by hand."""

import pytest
import torch
from transformers import TrainingArguments, get_scheduler

from stablemask.training.schedule import rate_at
from stablemask.training.trainer import LanguageModelTrainer

from ..models.tiny import tiny_model


@pytest.mark.parametrize(("warmup", "end"), [(0, 0.1), (7, 0.1), (7, 0.0), (7, 1.0)])
def test_a_cosine_from_zero_is_that_of_transformers_to_the_same_bits(warmup, end):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    kwargs = {"min_lr_rate": end}
    theirs = get_scheduler("cosine_with_min_lr", optimizer, warmup, 50, kwargs).lr_lambdas[0]
    ours = [
        rate_at(step, warmup=warmup, steps=50, shape="cosine", start=0.0, end=end)
        for step in range(60)
    ]
    assert ours[:51] == [theirs(step) for step in range(51)]


def test_a_line_from_a_starting_rate_to_an_end():
    settings = {"warmup": 4, "steps": 12, "shape": "linear", "start": 0.2, "end": 0.6}
    found = [rate_at(step, **settings) for step in (0, 1, 2, 4, 6, 8, 12)]
    assert found == pytest.approx([0.2, 0.4, 0.6, 1.0, 0.9, 0.8, 0.6])


def test_a_trainer_goes_by_the_rate_it_is_given(tmp_path):
    trainer = LanguageModelTrainer(
        model=tiny_model(), batches=None, collate=None, keep=1, rate=lambda step, steps: (steps - step) / 10,
        args=TrainingArguments(str(tmp_path), learning_rate=0.5, use_cpu=True, report_to=[]),
    )  # fmt: skip
    trainer.create_optimizer_and_scheduler(10)
    rates = []
    for _ in range(3):
        rates += trainer.lr_scheduler.get_last_lr()[:1]
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates == pytest.approx([0.5, 0.45, 0.4])
