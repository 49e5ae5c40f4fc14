"""Our Trainer, where it differs from the one it is."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainingArguments

from stablemask.training import trainer as trainer_module
from stablemask.training.trainer import LanguageModelTrainer

from ..models.tiny import random_ids, tiny_model


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"attention": "learned-sink"}, ".sinks"),
        ({"attention": "key-sink"}, ".sink_keys"),
        ({"attention": "learned-token"}, ".front_token"),
        ({"attention": "stablemask", "stablemask": {"gamma": "learned"}}, "log_gamma"),
    ],
)
def test_only_matrices_decay(settings, kept, tmp_path):
    model = tiny_model(**settings)
    trainer = LanguageModelTrainer(
        model=model, batches=None, collate=None, keep=1,
        args=TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to=[]),
    )  # fmt: skip
    groups = trainer.create_optimizer().param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    found = {name: decay[id(parameter)] for name, parameter in model.named_parameters()}
    assert any(name.endswith(kept) for name in found)
    for name, weight_decay in found.items():
        learned = name.endswith((".sinks", ".sink_keys", "log_gamma", "front_token"))
        learned = learned or "norm" in name
        assert weight_decay == (0 if learned else 0.1), name


def test_each_device_drops_out_something_else(tmp_path, monkeypatch):
    """As a step in one batch does for its rows: the same masks on all would be fewer of them."""

    def drops(rank):
        monkeypatch.setattr(trainer_module, "rank", lambda: rank)
        found = []

        class Dropping(LanguageModelTrainer):
            def get_train_dataloader(self):
                return [{"input_ids": torch.ones(1, 4, dtype=torch.long)}]

            def compute_loss(self, model, *args, **kwargs):
                found.append(torch.nn.functional.dropout(torch.ones(64)))
                return model.lm_head.weight.sum()

        Dropping(
            model=tiny_model(), batches=None, collate=None, keep=1,
            args=TrainingArguments(
                str(tmp_path), use_cpu=True, report_to=[], max_steps=1, disable_tqdm=True,
                save_strategy="no", seed=3,
            ),
        ).train()  # fmt: skip
        return found[0]

    assert torch.equal(drops(0), drops(0))
    assert not torch.equal(drops(0), drops(1))


class Reads(TorchDispatchMode):
    """In which steps a number was read, for which a GPU's host would wait."""

    def __init__(self, trainer):
        self.trainer, self.steps = trainer, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.steps.add(self.trainer.state.global_step)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("padded", [False, True])
def test_steps_that_log_nothing_read_nothing(padded, tmp_path):
    """Two micro-batches a step, with learned positions, of our decoder and its loss in chunks."""
    model = tiny_model(position_encoding="learned", attention="learned-sink")
    model.chunked_loss = True
    ids = random_ids(64, 16)

    class Batches:
        rank, ranks = 0, 1

        def __iter__(self):
            for i in range(20):
                batch = {"input_ids": ids[2 * i : 2 * i + 2], "labels": ids[2 * i : 2 * i + 2]}
                if padded:  # counted from the mask, of which the model is told nothing here
                    mask = torch.ones(2, 16, dtype=torch.long)
                    mask[0, 10:] = 0
                    batch["attention_mask"] = mask
                yield batch

    class Trainer(LanguageModelTrainer):
        def get_train_dataloader(self):
            return list(Batches())

        def compute_loss(self, model, inputs, *args, **kwargs):
            inputs = {name: t for name, t in inputs.items() if name != "attention_mask"}
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = Trainer(
        model=model, batches=None, collate=None, keep=1,
        args=TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], max_steps=6, logging_steps=3, disable_tqdm=True,
            gradient_accumulation_steps=2, save_strategy="no", logging_nan_inf_filter=False,
            per_device_train_batch_size=2, label_names=["labels"], remove_unused_columns=False,
        ),
    )  # fmt: skip
    with Reads(trainer) as reads:
        trainer.train()
    assert reads.steps <= {3, 6}
    assert trainer.state.num_input_tokens_seen == 6 * 2 * (26 if padded else 32)
