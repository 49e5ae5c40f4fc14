"""Training callbacks that several ranks must agree on, on gloo."""

import copy
import math
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler

from stablemask.training.callbacks import Probe, SkipBadSteps, StopOnSignal
from stablemask.training.sharding import shard

from ..models.tiny import random_ids, tiny_model


def same_everywhere(value) -> bool:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values.count(value) == len(values)


class _SignalToOne(TrainerCallback):
    """One rank is slow, and gets the signal while the other waits for it."""

    def __init__(self, event: str, rank: int, number: int):
        self.rank, self.number = rank, number
        setattr(self, event, self._event)

    def _event(self, args, state, control, **_):
        if dist.get_rank() == self.rank:
            time.sleep(0.01)
            if state.global_step == 4:
                os.kill(os.getpid(), self.number)


def _events_of_training(*callbacks) -> tuple[int, list[int]]:
    """Those of the Trainer, evaluating every 4 steps; the last step, and those that were saved."""
    args, state, control = None, TrainerState(), TrainerControl()
    handler, saved = CallbackHandler(list(callbacks), None, None, None, None), []
    handler.on_train_begin(args, state, control)
    while state.global_step < 40 and not control.should_training_stop:
        handler.on_step_begin(args, state, control)
        state.global_step += 1
        handler.on_step_end(args, state, control)
        if state.global_step % 4 == 0:
            handler.on_prediction_step(args, state, control)
            handler.on_evaluate(args, state, control, {})
        if control.should_save:
            saved.append(state.global_step)
            handler.on_save(args, state, control)
    handler.on_train_end(args, state, control)
    return state.global_step, saved


def _all_stop_after_the_same_step(folder, event, rank, number, steps):
    os.environ["RANK"] = str(dist.get_rank())
    messages = Path(folder) / f"{number}-{dist.get_rank()}"
    stderr = os.dup(2)
    os.dup2(os.open(messages, os.O_WRONLY | os.O_CREAT), 2)
    try:
        with StopOnSignal() as stop:
            step, saved = _events_of_training(_SignalToOne(event, rank, number), stop)
    finally:
        os.dup2(stderr, 2)
        os.environ.pop("RANK")
    assert stop.received == number
    assert step in steps, step
    assert saved == [step]
    assert same_everywhere(step)
    told = messages.read_text().count("saving a checkpoint, then stopping")
    assert told == (1 if dist.get_rank() == 0 else 0)


def test_ranks_stop_together_whichever_gets_the_signal(two_ranks, tmp_path):
    cases = [
        ("on_step_begin", 1, signal.SIGTERM, (5, 6)),
        ("on_step_end", 0, signal.SIGINT, (4, 5, 6)),
        ("on_prediction_step", 1, signal.SIGUSR1, (4,)),
    ]
    for case in cases:
        two_ranks.run(_all_stop_after_the_same_step, str(tmp_path), *case)


def _one_bad_rank_is_enough(spikes):
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=True)
    current = {}
    guard = SkipBadSteps(
        lambda: torch.tensor(current["loss"]), lambda: torch.tensor(1.0), limit=9, spikes=spikes
    )
    state = TrainerState(stateful_callbacks=[guard])
    mine = dist.get_rank() == 1
    accepted = []
    for step in range(50):
        loss = 3.0 + 0.1 * (step % 2)
        bad = {40: math.nan, 45: 8.0}.get(step)
        # Seen alone, rank 0 has no bad loss, and rank 1 nothing but them.
        current["loss"] = (bad or loss) if mine else loss
        model.weight.grad = torch.ones(1, 1)
        before = model.weight.detach().clone()
        guard.on_pre_optimizer_step(None, state, TrainerControl(), optimizer=optimizer)
        optimizer.step()
        guard.on_optimizer_step(None, state, TrainerControl(), optimizer=optimizer)
        accepted.append(not torch.equal(before, model.weight))
    assert accepted == [step != 40 and not (spikes and step == 45) for step in range(50)]
    logs = {"loss": math.nan}
    guard.on_log(None, state, TrainerControl(), logs=logs)
    assert same_everywhere((guard.state(), logs))


def test_ranks_skip_the_same_steps(two_ranks):
    for spikes in (0.0, 6.0):
        two_ranks.run(_one_bad_rank_is_enough, spikes)


def _sharded():
    torch.manual_seed(0)
    whole = tiny_model(tie_word_embeddings=True)
    sharded = copy.deepcopy(whole)
    shard(sharded, dtype="float32")
    return whole, sharded


def _probe_of_shards():
    whole, sharded = _sharded()
    torch.manual_seed(1)
    ids = random_ids(24)
    state, found = TrainerState(is_world_process_zero=dist.get_rank() == 0), []
    for model in (whole, sharded):
        logs = {"eval_loss": 1.0}
        Probe(ids).on_log(None, state, TrainerControl(), logs=logs, model=model)
        found.append(logs)
    if dist.get_rank() == 0:
        assert found[1].keys() == {
            "eval_loss", "eval_first_token_attention", "eval_first_token_attention_max",
            "eval_mask_ratio",
        }  # fmt: skip
        torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
    else:
        assert found[0] == {"eval_loss": 1.0}
    assert same_everywhere(found[1])


def test_a_sharded_model_is_probed_by_all_and_any_other_by_the_main_process(two_ranks):
    two_ranks.run(_probe_of_shards)


def _skip_on_shards():
    _, model = _sharded()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1, fused=True)
    norm = None
    guard = SkipBadSteps(lambda: loss.detach(), lambda: norm, limit=3)
    state = TrainerState(stateful_callbacks=[guard])
    ids = random_ids(2, 8)
    kept = None
    for step, factor in enumerate((1.0, math.nan, 1.0)):
        loss = model(input_ids=ids, labels=ids).loss * factor
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).full_tensor()
        state.global_step = step
        guard.on_pre_optimizer_step(None, state, TrainerControl(), optimizer=optimizer)
        before = [p.to_local().clone() for p in model.parameters()]
        optimizer.step()
        guard.on_optimizer_step(None, state, TrainerControl(), optimizer=optimizer)
        optimizer.zero_grad()
        changed = any(not torch.equal(b, p.to_local()) for b, p in zip(before, model.parameters()))
        assert changed == (step != 1), step
        kept = [s["step"].item() for s in optimizer.state.values()]
    assert set(kept) == {2.0}


def test_a_step_of_shards_is_skipped(two_ranks):
    two_ranks.run(_skip_on_shards)
