"""Trainings at the best of several learning rates, found on one seed: what ``ablation`` and ``long`` are made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.tables import table
from stablemask.data.sources import packages_of
from stablemask.evaluation.perplexity import perplexity_of
from stablemask.evaluation.statistics import estimate
from stablemask.hf.loading import load_model

from . import language, sinks
from .language_section import by_seed, difference
from .models import corpus_of, evaluations, final_loss, trained
from .scaling import losses_past_the_context
from .study import Job, Record

SWEEP, FINAL = "sweep", "final"
PARTS = 20  # of a training: evaluations, and checkpoints that a killed one goes on from
CURVE_TOKENS, FINAL_TOKENS = 16_384, 262_144  # of validation
BLOCKS = 64  # of validation, whose attention is looked at


class Size(NamedTuple):
    """A model and how it is trained.

    Attributes:
        rates: learning rates that are tried; with one there is no sweep.
        tried: steps of a trial.
        tokens: of a step.
        seconds: of a thousand steps, roughly.
    """

    preset: str
    steps: int
    tried: int
    rates: tuple[float, ...]
    tokens: int
    seconds: float


def jobs(
    sizes: Sequence[Size], rows: Mapping[str, Mapping[str, Any]], seeds: int, **run: Any
) -> list[Job]:
    """A trial of each rate, and then a training of each seed at the best.

    Args:
        rows: options of the attention, by label.
        run: ``source`` and ``position``.
    """
    return [
        job
        for size in sizes
        for label, settings in rows.items()
        for job in _jobs_of(size, label, {**run, "settings": dict(settings)}, seeds)
    ]


def _jobs_of(size: Size, label: str, run: Record, seeds: int) -> Iterator[Job]:
    context = language.context_of(size.preset)
    run = {**run, "label": label, "preset": size.preset, "context": context, "tokens": size.tokens}
    trials = []
    for rate in size.rates if len(size.rates) > 1 else ():
        arguments = {
            **run, "group": SWEEP, "steps": size.tried, "seed": 0, "learning_rate": rate,
        }  # fmt: skip
        name = f"{SWEEP}-{size.preset}-{label}-{rate:g}"
        trials.append(Job(name, train_and_score, arguments, size.seconds * size.tried / 1000))
    yield from trials
    for seed in range(seeds):
        arguments = {
            **run, "group": FINAL, "steps": size.steps, "seed": seed, "rates": list(size.rates),
        }  # fmt: skip
        name = f"{FINAL}-{size.preset}-{label}-{seed}"
        after = tuple(trial.name for trial in trials)
        yield Job(name, train_and_score, arguments, size.seconds * size.steps / 1000, after)


def train_and_score(
    work: Path, *, before: Sequence[Record] = (), rates: Sequence[float] = (), **run: Any
) -> Record:
    """Train a model, or go on with it, and look at it.

    Args:
        before: the records of the trials, of which the best tells the rate; without any it is that of
            ``run``, or the one of ``rates``.
    """
    if before:
        run["learning_rate"] = min(before, key=lambda trial: trial["loss"])["learning_rate"]
    elif rates:
        (run["learning_rate"],) = rates
    part = max(1, run["steps"] // PARTS)
    options = language.training_options(run) | {
        "eval_every": part, "save_every": part, "eval_tokens": CURVE_TOKENS, "final_eval_tokens": FINAL_TOKENS,
    }  # fmt: skip
    folder = trained(work, language.model_name(run, options), options)
    corpus = corpus_of(options)
    found = {
        "learning_rate": run["learning_rate"],
        "model": folder.name,
        "loss": final_loss(folder),
        "curve": [[log["step"], round(log["eval_loss"], 5)] for log in evaluations(folder)],
        "corpus": corpus.key,
        "train_tokens": corpus.num_train_tokens,
        "packages": packages_of(run["source"]),
    }
    if run["group"] == SWEEP:
        return found
    model = load_model(str(folder), device="cuda" if torch.cuda.is_available() else "cpu")
    blocks = sinks.blocks_of(corpus.validation, BLOCKS)
    attention = sinks.attention_by_layer(model, blocks, sinks.delimiters_of(corpus.tokenizer))
    return found | {
        "far": losses_past_the_context(model, corpus.validation.tokens, run["context"]),
        "attention": {
            name: [round(value, 5) for value in values] for name, values in attention.items()
        },
    }


def finals(records: Sequence[Record]) -> list[Record]:
    return [record for record in records if record["group"] == FINAL]


def sizes_of(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record["preset"] for record in records))


def labels_of(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(record["label"] for record in records))


def rates_table(records: Sequence[Record]) -> str:
    """Loss of each trial, a row for each label and size."""
    trials = [record for record in records if record["group"] == SWEEP]
    if not trials:
        return ""
    rows = [
        [preset, label, *(f"{of.get(rate, float('nan')):.3f} at {rate:g}" for rate in sorted(of))]
        for preset in sizes_of(trials)
        for label in labels_of(trials)
        if (of := {
            record["learning_rate"]: record["loss"]
            for record in trials
            if (record["preset"], record["label"]) == (preset, label)
        })
    ]  # fmt: skip
    most = max(map(len, rows))
    head = ["size", "", *(f"rate {n + 1}" for n in range(most - 2))]
    return table(head, [row + [""] * (most - len(row)) for row in rows])


def losses_cells(records: Sequence[Record], preset: str, label: str) -> list[str]:
    """Rate, perplexity and nats less softmax's of the final trainings; empty where there are none."""
    of_size = [record for record in finals(records) if record["preset"] == preset]
    ours = by_seed(of_size, label=label)
    if not ours:
        return ["", "", ""]
    rate = next(record["learning_rate"] for record in of_size if record["label"] == label)
    less = difference(ours, by_seed(of_size, label="softmax"))
    perplexity = estimate([perplexity_of(loss) for loss in ours.values()]).text(2)
    return [f"{rate:g}", perplexity, less.text(3) if less and label != "softmax" else ""]
