"""Steps that never reach the weights. The Trainer is real, the model tiny."""

import json
import math
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from stablemask.errors import RunError
from stablemask.training.callbacks import Record, SkipBadSteps

from ..cuda_contract import Reads
from ..models.tiny import tiny_model
from .loop import Blocks, make_loop


def make_model():
    torch.manual_seed(0)
    return tiny_model(torch.float64, attention="softmax")


def guarded(model, folder, *others, limit=3, spikes=0.0, record=None, **arguments):
    """A loop and its guard, which is the first callback."""
    guard = SkipBadSteps(
        lambda: loop.step_loss, lambda: loop.grad_norm, limit=limit, spikes=spikes,
        record=None if record is None else record.add,
    )  # fmt: skip
    loop = make_loop(model, folder, guard, *([record] if record else []), *others, **arguments)
    return loop, guard


def plain_training(steps, *, left_out=()):
    """What PyTorch alone makes of the same data: AdamW, the gradient clipped at 1."""
    model, blocks = make_model().train(), Blocks(512)
    decay = [p for n, p in model.named_parameters() if "norm" not in n]
    rest = [p for n, p in model.named_parameters() if "norm" in n]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    losses = []
    for step in range(1, steps + 1):
        ids = blocks.tokens[2 * step - 2 : 2 * step]
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        if step in left_out:
            continue
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), losses


def assert_same_weights(state, other):
    for name in state:
        torch.testing.assert_close(state[name], other[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [1.0, 1e9])
def test_a_step_that_is_not_finite_is_as_if_it_never_was(value, clip, tmp_path, capsys):
    record = Record(tmp_path / "metrics.jsonl")
    model = make_model()
    loop, guard = guarded(
        model, tmp_path / "c", record=record, weight_decay=0.1, max_grad_norm=clip
    )
    loop.factor = lambda step: value if step in (3, 6) else 1.0
    loop.train()
    assert guard.skipped == 2
    if clip == 1.0:
        expected, losses = plain_training(8, left_out=(3, 6))
        assert_same_weights(model.state_dict(), expected)
    assert all(p.isfinite().all() for p in model.parameters())
    rows = [json.loads(line) for line in record.path.read_text().splitlines()]
    reasons = {row["step"]: row["skipped_because"] for row in rows if "skipped_because" in row}
    assert reasons.keys() == {3, 6}
    assert "not finite" in reasons[3]
    training = [row for row in rows if "loss" in row]
    assert [row["skipped"] for row in training] == [0, 1, 2, 2]
    if clip == 1.0:  # the mean of the accepted ones
        means = [sum(losses[:2]) / 2, losses[3], losses[4], sum(losses[6:]) / 2]
        assert [row["loss"] for row in training] == pytest.approx(means, abs=1e-5)
    errors = capsys.readouterr().err
    assert "step 3 is skipped: the loss" in errors
    assert ", 2 skipped, " in errors


def test_gradients_alone_may_not_be_finite(tmp_path):
    model = make_model()
    model.lm_head.weight.register_hook(
        lambda g: g * (math.nan if loop.state.global_step == 1 else 1)
    )
    loop, guard = guarded(model, tmp_path, steps=4, weight_decay=0.1)
    loop.train()
    assert guard.skipped == 1
    assert_same_weights(model.state_dict(), plain_training(4, left_out=(2,))[0])


@pytest.mark.parametrize("spikes", [0.0, 6.0])
def test_no_step_waits_for_its_own_numbers(spikes, tmp_path):
    """What the host reads before an optimizer step is of the step before, which a GPU has long done."""

    class Before(TrainerCallback):
        reads: ClassVar[list[int]] = []

        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 0:
                reads.count = 0  # the seed of a loader

        def on_pre_optimizer_step(self, *_, **__):
            self.reads.append(reads.count)

    loop, guard = guarded(
        make_model(), tmp_path, Before(), spikes=spikes, steps=40, logging_steps=100,
        include_num_input_tokens_seen="no",
    )  # fmt: skip
    with Reads() as reads:
        loop.train()
    assert Before.reads == list(range(40))
    assert len(guard.losses) == 40


def test_an_optimizer_that_cannot_leave_a_step_out_is_refused(tmp_path):
    loop, _ = guarded(make_model(), tmp_path, optim="adamw_torch")
    with pytest.raises(ValueError, match="got AdamW without fused=True"):
        loop.train()


def test_too_many_in_a_row_end_the_run_with_what_to_try(tmp_path):
    model = make_model()
    loop, guard = guarded(model, tmp_path, limit=3, weight_decay=0.1)
    loop.factor = lambda step: math.nan if step in (1, 2, 4, 5, 6) else 1.0
    with pytest.raises(RunError, match=r"3 steps in a row.* not finite at step 6; .*learning-rate"):
        loop.train()
    assert guard.skipped == 5
    assert_same_weights(model.state_dict(), plain_training(5, left_out=(1, 2, 4, 5))[0])


def drive(losses, *, spikes, limit=5):
    """Which of the losses a guard accepts, of a model that has one weight."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    current = {}
    guard = SkipBadSteps(
        lambda: torch.tensor(current["loss"]), lambda: torch.tensor(1.0), limit=limit, spikes=spikes
    )
    state, control = TrainerState(stateful_callbacks=[guard]), TrainerControl()
    accepted = []
    for step, loss in enumerate(losses):
        state.global_step, current["loss"] = step, loss
        model.weight.grad = torch.ones(1, 1)
        before = model.weight.detach().clone()
        guard.on_pre_optimizer_step(None, state, control, optimizer=optimizer)
        optimizer.step()
        guard.on_optimizer_step(None, state, control, optimizer=optimizer)
        accepted.append(not torch.equal(before, model.weight))
    return accepted, guard


def test_a_spike_is_measured_against_the_last_accepted_losses():
    quiet = torch.linspace(2.9, 3.1, 128, dtype=torch.float64).tolist()  # deviation 0.0582
    mean, deviation = 3.0, float(torch.tensor(quiet, dtype=torch.float64).std(correction=0))
    just_below, just_above = mean + 5.9 * deviation, mean + 6.1 * deviation
    assert drive([*quiet, just_below], spikes=6.0)[0][-1]
    assert not drive([*quiet, just_above], spikes=6.0)[0][-1]
    assert drive([*quiet, just_above], spikes=0.0)[0][-1]
    assert drive([*quiet, 0.1], spikes=6.0)[0][-1]  # a fall is none
    # A skipped spike does not raise the bar for the next.
    assert drive([*quiet, just_above, just_above], spikes=6.0)[0][-2:] == [False, False]
    # Too few to compare with.
    assert drive([*quiet[:31], 100.0], spikes=6.0)[0][-1]
    assert not drive([*quiet[:32], 100.0], spikes=6.0)[0][-1]
    # What is long past does not count.
    assert not drive([50.0] * 100 + quiet + [40.0], spikes=6.0)[0][-1]


def test_a_loss_that_rises_for_good_ends_the_run():
    with pytest.raises(
        RunError, match=r"5 steps in a row .* \(9.000\) is far above .* at step 45;"
    ):
        drive([3.0, 3.1] * 20 + [9.0] * 10, spikes=6.0)


def test_a_spike_in_training_is_skipped(tmp_path, capsys):
    model = make_model()
    loop, guard = guarded(model, tmp_path, spikes=6.0, steps=40, weight_decay=0.1)
    loop.factor = lambda step: 30.0 if step == 36 else 1.0
    loop.train()
    assert guard.skipped == 1
    assert "step 36 is skipped: the loss (" in capsys.readouterr().err
    assert_same_weights(model.state_dict(), plain_training(40, left_out=(36,))[0])


def test_a_resumed_run_has_seen_what_the_first_part_saw(tmp_path):
    """Losses in JSON come back to the last bit, the counts too."""
    first = make_model()
    loop, guard = guarded(first, tmp_path, spikes=2.0, save_steps=50, steps=60, limit=4)
    loop.factor = lambda step: math.nan if step in (48, 49, 50) else 1.0
    loop.train()
    whole = guard.state()

    second = make_model()
    loop, guard = guarded(second, tmp_path, spikes=2.0, steps=60, limit=4)
    seen = SimpleNamespace()
    step_begin, guard.on_step_begin = (
        guard.on_step_begin,
        lambda *a, **k: (
            vars(seen).setdefault("first", (guard.skipped, guard.in_a_row, len(guard.losses)))
            and step_begin(*a, **k)
        ),
    )
    loop.train(resume_from_checkpoint=str(tmp_path / "checkpoint-50"))
    skipped, in_a_row, count = seen.first
    assert (in_a_row, count) == (3, 50 - skipped)
    assert guard.state() == whole
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name


def test_a_checkpoint_without_a_guard_is_gone_on_with(tmp_path):
    make_loop(make_model(), tmp_path, steps=4, save_steps=4).train()
    loop, guard = guarded(make_model(), tmp_path, steps=8, save_steps=8)
    loop.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert len(guard.losses) == 4
    saved = TrainerState.load_from_json(tmp_path / "checkpoint-8" / "trainer_state.json")
    assert saved.stateful_callbacks["SkipBadSteps"] == guard.state()
