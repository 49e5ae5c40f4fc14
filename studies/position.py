"""Can a model tell where a token stands? Identical tokens, and tasks that need absolute positions.

Each job trains a small model a task, in turn, in a plain loop and not by a Trainer: hundreds of trainings
of a few seconds, of which setting up a Trainer, its loader and its folder would be the greater part. On a
task all kinds of attention and encodings of positions have the same steps, batches, learning rate and
sequences, and one rule ends a training early: 99.9 % right on a fixed check.

The jobs compute on the CPU wherever they run: a step of these models is hundreds of kernels of some
microseconds, for which a GPU waits as long as a core computes, and a machine has more cores than GPUs. Give
them all, with ``--workers``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import get_cosine_schedule_with_warmup

from stablemask.evaluation.sinks import identical_token_spread
from stablemask.models import StableMaskConfig, StableMaskForCausalLM

from .kinds import KINDS, config_fields
from .study import Job, Record
from .tasks import TASKS, UNASKED, Task

ENCODINGS = ("rope", "alibi", "nope")
# Absolute positions, under plain softmax: what the others are held against.
REFERENCES = ("learned", "sinusoidal")
LAYERS, WIDTH = 3, 64
CHECK_EVERY = 50  # steps
LEARNT = 0.999  # accuracy on the check that ends a training
CHECKED, TESTED = 32, 64  # sequences
SHORTEST = 8  # tokens of the first sequences, where they grow
PARTS = 16  # of a sequence, whose accuracies are recorded apart
IDENTIFICATION = {
    "constant": "one token repeated",
    "runs": "two symbols in long runs",
    "random": "random tokens",
}

# `grown` is the share of the steps over which sequences double from SHORTEST to the training length, with as
# many tokens in a batch. Tried on one seed: without it even-token prediction stays at chance with StableMask
# and with sinusoidal positions, and copying is learned later; with it positions are identified later.
_REPEATED = {"steps": 600, "batch": 2, "learning_rate": 1e-2, "grown": 0.0}
_MIXED = {"steps": 300, "batch": 8, "learning_rate": 3e-3, "grown": 0.0}
TRAININGS: dict[str, dict[str, Any]] = {
    "constant": _REPEATED,
    "runs": _MIXED,
    "random": _MIXED,
    "parity": _REPEATED,
    "copy": {**_MIXED, "grown": 0.6},
    "even": {"steps": 1000, "batch": 8, "learning_rate": 4e-3, "grown": 0.6},
}
LONGER_TRAININGS: dict[str, dict[str, Any]] = {
    "constant": {**_REPEATED, "steps": 700},
    "random": {**_MIXED, "batch": 4},
    "copy": {**_MIXED, "batch": 4, "grown": 0.6},
    "even": {**TRAININGS["even"], "batch": 4},
}
# What Yin et al. ask beside position identification, at the shortest length. In jobs of their own, for a job
# whose trainings change is done anew.
PAPERS_TRAININGS: dict[str, dict[str, Any]] = {
    "marked": {**TRAININGS["even"], "batch": 4},
    "numbers": _REPEATED,
}
# The variants of StableMask are compared in position identification, at the shortest length.
VARIANTS = ("stablemask-finite", "stablemask-slopes")
SPREAD_AFTER = ("constant", "random")
LENGTHS = {"small": (64, 128), "gpu": (64, 128, 256)}
STEPS_FACTOR = {"small": 1.0, "gpu": 1.25}


def jobs(scale: str, seeds: int) -> list[Job]:
    """One for each seed, length, encoding and kind; absolute encodings run under softmax alone."""
    designs = [(encoding, "softmax") for encoding in REFERENCES]
    designs += [(encoding, kind) for encoding in ENCODINGS for kind in KINDS]
    return [
        _job(group, encoding, kind, length, seed, trainings)
        for seed in range(seeds)
        for length in LENGTHS[scale]
        for encoding, kind in designs
        for group, chosen in _groups(kind, length == LENGTHS[scale][0]).items()
        if (trainings := _at_scale(chosen, scale))
    ]


def _groups(kind: str, shortest: bool) -> dict[str, dict[str, dict[str, Any]]]:
    """Trainings by the beginning of their job's name."""
    if not shortest:
        return {"": {} if kind in VARIANTS else LONGER_TRAININGS}
    of_variants = {task: TRAININGS[task] for task in IDENTIFICATION}
    return {"": of_variants if kind in VARIANTS else TRAININGS, "paper-": PAPERS_TRAININGS}


def _at_scale(trainings: dict[str, dict[str, Any]], scale: str) -> dict[str, dict[str, Any]]:
    return {
        task: {**training, "steps": round(training["steps"] * STEPS_FACTOR[scale])}
        for task, training in trainings.items()
    }


def _job(
    group: str,
    encoding: str,
    kind: str,
    length: int,
    seed: int,
    trainings: dict[str, dict[str, Any]],
) -> Job:
    steps = sum(training["steps"] for training in trainings.values())
    tokens = length * sum(training["steps"] * training["batch"] for training in trainings.values())
    seconds = 5e-3 * steps + 1.2e-5 * tokens
    return Job(
        f"{group}{encoding}-{kind}-{length}-{seed}",
        measure,
        {
            "encoding": encoding, "kind": kind, "length": length, "seed": seed,
            "trainings": trainings,
        },
        seconds * (0.45 if encoding in REFERENCES else 0.8),
    )  # fmt: skip


def measure(
    work: Path,
    *,
    encoding: str,
    kind: str,
    length: int,
    seed: int,
    trainings: Mapping[str, Mapping[str, Any]],
) -> Record:
    """Train and test a model on each task, and see how far identical tokens come apart in it.

    Returns:
        ``spread`` of the final hidden states of identical tokens by what the model was trained on, and of
        each task the ``steps`` taken, the ``accuracy`` on fresh sequences, the same ``by_position`` in
        sixteenths of the sequence, and on sequences of ``twice`` the length, each half apart; None for
        learned positions, which end at the training length.
    """
    spread: dict[str, float] = {}
    tasks: dict[str, Record] = {}
    for name, training in trainings.items():
        task = TASKS[name]
        torch.manual_seed(seed)
        model = build(encoding, kind, length, task.num_classes(2 * length))
        if name in SPREAD_AFTER:
            spread.setdefault("untrained", identical_token_spread(model, length).spread)
        steps = train(model, task, length, seed, **training)
        if name in SPREAD_AFTER:
            spread[name] = identical_token_spread(model, length).spread
        tasks[name] = {"steps": steps, **examine(model, task, length, seed)}
    return {"spread": spread, "tasks": tasks}


def build(encoding: str, kind: str, length: int, vocab_size: int) -> StableMaskForCausalLM:
    """A model of 0.12 million parameters besides its vocabulary."""
    config = StableMaskConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=length,
        position_encoding=encoding,
        initializer_range=0.1,
        use_cache=False,
        **config_fields(kind, length),
    )
    return StableMaskForCausalLM(config)


def train(
    model: StableMaskForCausalLM,
    task: Task,
    length: int,
    seed: int,
    *,
    steps: int,
    batch: int,
    learning_rate: float,
    grown: float,
) -> int:
    """Train with AdamW, a tenth of warm-up and a cosine to zero; returns the steps taken."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    data, check = _generator(seed, "train"), _generator(seed, "check")
    checked = task.sample(check, CHECKED, length)
    for step in range(1, steps + 1):
        shown = length_at(step / steps, length, grown)
        inputs, targets = task.sample(data, batch * length // shown, shown)
        model(input_ids=inputs, shift_labels=targets).loss.backward()
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % CHECK_EVERY:
            continue
        if _Answers.of(model, *checked).share(task.first_scored) >= LEARNT:
            return step
    return steps


def length_at(done: float, length: int, grown: float) -> int:
    """Tokens of the sequences when a share ``done`` of the steps has passed."""
    if done >= grown:
        return length
    return min(length, SHORTEST << int(done / grown * math.log2(length / SHORTEST)))


def examine(model: StableMaskForCausalLM, task: Task, length: int, seed: int) -> Record:
    """Accuracies on fresh sequences, of the training length and of twice of it."""
    data = _generator(seed, "test")
    first = task.first_scored
    found = _Answers.of(model, *task.sample(data, TESTED, length))
    ends = [part * length // PARTS for part in range(PARTS + 1)]
    result: Record = {
        "accuracy": found.share(first),
        "by_position": [round(found.share(*part), 4) for part in pairwise(ends)],
        "twice": None,
    }
    if model.config.position_encoding != "learned":
        found = _Answers.of(model, *task.sample(data, TESTED, 2 * length))
        result["twice"] = [found.share(first, length), found.share(length)]
    return result


class _Answers(NamedTuple):
    """How many are right and how many were asked for, by position, (length,) each."""

    right: Tensor
    asked: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: StableMaskForCausalLM, inputs: Tensor, targets: Tensor) -> _Answers:
        right = model(input_ids=inputs).logits.argmax(-1) == targets
        return cls(right.sum(0), (targets != UNASKED).sum(0))

    def share(self, start: int, end: int | None = None) -> float:
        """Right ones among those from ``start`` to ``end``; 0 where nothing was asked."""
        asked = self.asked[start:end].sum().item()
        return self.right[start:end].sum().item() / asked if asked else 0.0


def _generator(seed: int, use: str) -> Generator:
    uses = ("train", "check", "test")
    return Generator().manual_seed(len(uses) * seed + uses.index(use))
