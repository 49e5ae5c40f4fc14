"""The loss of a batch, by hand; its two teachers; what harms a model is told."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from stablemask.errors import InputError, RunError
from stablemask.evaluation import reduce_attention
from stablemask.models.settings import SHIFT_PARAMETER
from stablemask.training.adapting.prefix import Prefix
from stablemask.training.adapting.trainer import (
    FIRST_TOKEN_WEIGHT,
    SHIFT_RATE,
    DistillingTrainer,
    Schedule,
)
from stablemask.training.finetune import _build_trainer, _prepare, finetune
from stablemask.training.finetune_options import FinetuneOptions

from ..conftest import metrics


@pytest.fixture
def options(base, monkeypatch) -> FinetuneOptions:
    """Of runs whose prefix is the token 28, whatever this model would choose."""
    prefix = Prefix(28, "<", {"": 2.0, "<": 1.0})
    monkeypatch.setattr("stablemask.training.finetune.find_prefix", lambda *_: prefix)
    return FinetuneOptions(
        model=str(base), adapt=True, steps=10, texts=6, context=24, batch_size=2, dtype="float32",
        out="", tensorboard=False, eval_tokens=24,
    )  # fmt: skip


def trainer_of(options: FinetuneOptions, folder: Any) -> DistillingTrainer:
    folder.mkdir()
    options = replace(options, out=str(folder)).resolved()
    return _build_trainer(options, folder, _prepare(options, folder), None)  # type: ignore[return-value]


def padded(prefix: int) -> dict[str, torch.Tensor]:
    """Two texts, of which one begins with the prefix itself and the other is short."""
    ids = torch.randint(10, 250, (2, 20))
    ids[0, 0] = prefix
    mask = torch.ones_like(ids)
    mask[1, 14:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_the_schedule_follows_from_the_step():
    schedule = Schedule(100)
    assert [schedule.alpha(step) for step in (0, 10, 40, 100)] == pytest.approx([1, 0.75, 0, 0])
    assert [schedule.bound(step) for step in (0, 30, 60, 100)] == pytest.approx([12, 6, 3, 3])


def test_the_loss_of_a_padded_batch_is_that_of_its_texts_alone(options, tmp_path):
    trainer = trainer_of(options, tmp_path / "run")
    model, teacher = trainer.model.eval(), trainer.distillation.teacher
    prefix = trainer.distillation.prefix
    batch = padded(prefix)
    trainer.state.global_step = 4  # the value has gone, so a model without a watch is the student
    found = trainer.compute_loss(model, batch)
    sums = {name: total.item() for name, total in trainer._sums.items()}
    trainer._watch.set(None, None)

    kl, shares, texts = 0.0, [], []
    for row, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        text = row[mask][None]
        read = text if text[0, 0] == prefix else F.pad(text, (1, 0), value=prefix)
        with torch.no_grad():
            goal = teacher(read).logits[0, -text.shape[1] :].double().log_softmax(-1)
            ours = model(text).logits[0].double().log_softmax(-1)
        kl += (goal.exp() * (goal - ours)).sum().item()
        texts.append(text)
    tokens = int(batch["attention_mask"].sum())
    assert sums["kl"] == pytest.approx(kl / tokens, rel=1e-4)
    assert found.item() == pytest.approx(
        sums["kl"] + FIRST_TOKEN_WEIGHT * sums["first_token"] + sums["excess"], rel=1e-5
    )
    for text in texts:  # the dense maps of each layer
        real = reduce_attention(model, text[0], lambda layer: layer.real[0, :, 8:, 0])
        shares.append(torch.stack(real))
    expected = torch.cat(shares, dim=-1).mean().item()
    assert sums["first_token"] == pytest.approx(expected, rel=1e-3)


def test_without_its_adapter_and_shifts_the_student_is_its_teacher(options, tmp_path):
    full = trainer_of(options, tmp_path / "full")
    low = trainer_of(replace(options, lora=True), tmp_path / "low")
    for name, parameter in low.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert low.distillation.teacher is None
    ids = padded(full.distillation.prefix)["input_ids"]
    torch.testing.assert_close(low._goal(ids), full._goal(ids))
    assert low.distillation.prefix == full.distillation.prefix
    assert not low._bare.config.attention_bias  # an adapter cannot change the model it is for
    trained = {name for name, p in low.model.named_parameters() if p.requires_grad}
    assert all("lora" in name or name.endswith(SHIFT_PARAMETER) for name in trained)
    low._watch.set(None, None)
    with torch.no_grad():
        assert (low.model(ids).logits - full.model(ids).logits).abs().max() > 0.1


def test_shifts_learn_faster_than_weights_and_do_not_decay(options, tmp_path):
    trainer = trainer_of(replace(options, weight_decay=0.1, warmup=0), tmp_path / "run")
    optimizer = trainer.create_optimizer()
    *weights, shifts = optimizer.param_groups
    assert {id(p) for p in shifts["params"]} == {
        id(p) for name, p in trainer.model.named_parameters() if name.endswith(SHIFT_PARAMETER)
    }
    assert (shifts["lr"], shifts["weight_decay"]) == (SHIFT_RATE * 5e-5, 0.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(
        list(trainer.model.parameters())
    )
    assert {group["lr"] for group in weights} == {5e-5}


def test_a_value_that_is_kept_leaves_the_first_loss_small(options, tmp_path):
    """At step 0 the sink stands for the prefix: what is left is that a constant replaces its scores."""
    trainer = trainer_of(replace(options, lora=True), tmp_path / "run")
    batch = padded(trainer.distillation.prefix)
    losses = []
    for step in (0, 4):
        trainer.state.global_step = step
        trainer._sums["kl"].zero_()
        trainer.compute_loss(trainer.model, batch)
        losses.append(trainer._sums["kl"].item())
    assert losses[0] < losses[1] / 2


def test_a_step_is_the_same_in_however_many_batches_its_texts_are(options, chats, tmp_path):
    """Conversations are of unequal lengths: a mean of the batches' means would be another."""
    chosen = replace(
        options,
        data=str(chats),
        texts=0,
        context=64,
        global_batch_size=8,
        steps=2,
        warmup=0,
        log_every=1,
    )
    folders = [tmp_path / str(size) for size in (8, 2)]
    for folder, size in zip(folders, (8, 2)):
        finetune(replace(chosen, out=str(folder), batch_size=size))
    whole, parts = (load_file(folder / "model.safetensors") for folder in folders)
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=0, atol=2e-6)
    whole, parts = ([row for row in metrics(folder) if "kl" in row] for folder in folders)
    for ours, theirs in zip(parts, whole, strict=True):
        for name in ("loss", "kl", "first_token", "excess"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-7)


def test_a_checkpoint_without_settings_is_refused(options, base, tmp_path):
    trainer = trainer_of(options, tmp_path / "run")
    with pytest.raises(InputError, match="is no checkpoint of this run"):
        trainer._load_from_checkpoint(str(base))


def test_a_run_that_ruins_its_model_says_so(options, tmp_path):
    """As the shift that was once the default did."""
    harmed = replace(options, out=str(tmp_path / "run"), learning_rate=1.0, warmup=0, steps=4)
    with pytest.raises(RunError, match="has harmed the model"):
        finetune(harmed)
    assert (tmp_path / "run" / "model.safetensors").exists()
