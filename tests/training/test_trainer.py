"""Our Trainer, where it differs from the one it is."""

import pytest
from transformers import TrainingArguments

from stablemask.training.trainer import LanguageModelTrainer

from ..models.tiny import tiny_model


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"attention": "learned-sink"}, ".sinks"),
        ({"attention": "stablemask", "stablemask": {"gamma": "learned"}}, "log_gamma"),
    ],
)
def test_only_matrices_decay(settings, kept, tmp_path):
    model = tiny_model(**settings)
    trainer = LanguageModelTrainer(
        model=model, batches=lambda *_: None, collate=None, keep=1,
        args=TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to=[]),
    )  # fmt: skip
    groups = trainer.create_optimizer().param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    found = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    assert any(name.endswith(kept) for name in found)
    for name, weight_decay in found.items():
        learned = name.endswith((".sinks", "log_gamma")) or "norm" in name
        assert weight_decay == (0 if learned else 0.1), name
