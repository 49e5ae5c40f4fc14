"""Language modelling: every attention kind over position encodings and sizes, and what the mass should be."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from stablemask.models.presets import PRESETS

from .kinds import KINDS, settings_of
from .models import evaluations, final_loss, trained
from .study import SOURCE, Job, Record

POSITIONS = ("rope", "alibi", "nope", "learned")
GRID, TEXT, RATE, GAMMA, ABLATION = "grid", "text", "rate", "gamma", "ablation"
CURVE_TOKENS, FINAL_TOKENS = 8192, 65536  # of validation, during a training and after it

GAMMA_X_CONTEXT = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)


class Size(NamedTuple):
    """A model and how it is trained.

    Attributes:
        tokens: of a step.
        seconds: of one training, roughly.
    """

    preset: str
    steps: int
    tokens: int
    learning_rate: float
    seconds: float


class Plan(NamedTuple):
    """What a scale trains.

    Attributes:
        sizes: the first is that of every ablation.
        grid: kinds by size and position encoding.
        contexts: of the ablation of gamma x context.
        rates: learning rates, as multiples of the size's, at which a pair of kinds is trained too.
    """

    sizes: tuple[Size, ...]
    grid: dict[str, dict[str, tuple[str, ...]]]
    contexts: tuple[int, ...]
    rates: tuple[float, ...]


PAIR = ("softmax", "stablemask")
PLANS = {
    "small": Plan(
        sizes=(Size("nano", 360, 1024, 3e-3, 19), Size("micro", 360, 1024, 2e-3, 46)),
        grid={
            "nano": dict.fromkeys(POSITIONS, KINDS),
            "micro": {"rope": KINDS, "alibi": PAIR, "nope": PAIR, "learned": PAIR},
        },
        contexts=(64, 256),
        rates=(0.5, 2.0),
    ),
    "gpu": Plan(
        sizes=(Size("71m", 300, 32768, 1e-3, 25), Size("160m", 300, 32768, 6e-4, 55)),
        grid={"71m": {"rope": KINDS}, "160m": {"rope": PAIR}},
        contexts=(),
        rates=(),
    ),
}


def jobs(scale: str, seeds: int, text: str | None = None) -> list[Job]:
    """``text`` is one more source, on which the first size is compared too."""
    return [_job(size, run) for size, run in _runs(PLANS[scale], seeds, text)]


def _runs(plan: Plan, seeds: int, text: str | None) -> Iterator[tuple[Size, Record]]:
    first = plan.sizes[0]
    context = context_of(first.preset)
    for seed in range(seeds):  # all comparisons of a seed before the next one, for early news
        run = partial(_run, seed)
        for size in plan.sizes:
            own = context_of(size.preset)
            for position, kinds in plan.grid[size.preset].items():
                for kind in kinds:
                    yield size, run(GRID, kind, settings_of(kind, own), own, position=position)
        if text is not None:
            for kind in PAIR:
                yield first, run(TEXT, kind, settings_of(kind, context), context, source=text)
        for length in plan.contexts:
            for product in GAMMA_X_CONTEXT:
                settings = {"attention": "stablemask", "gamma": product / length}
                yield first, run(GAMMA, f"{product:g}", settings, length)
            yield first, run(GAMMA, "softmax", {"attention": "softmax"}, length)
        if plan.contexts:
            for label, settings in ablations(first.preset).items():
                yield first, run(ABLATION, label, {"attention": "stablemask", **settings}, context)
        for size in plan.sizes:
            own = context_of(size.preset)
            for rate in (factor * size.learning_rate for factor in plan.rates):
                for kind in PAIR:
                    yield size, run(RATE, kind, settings_of(kind, own), own, learning_rate=rate)


def _run(
    seed: int, group: str, label: str, settings: dict[str, Any], context: int, **others: Any
) -> Record:
    run = {"source": SOURCE, "position": "rope", "seed": seed, "label": label, "context": context}
    return {**run, "group": group, "settings": settings, **others}


def context_of(preset: str) -> int:
    """Tokens in a training block of a preset."""
    return PRESETS[preset]["max_position_embeddings"]


def ablations(preset: str) -> dict[str, dict[str, Any]]:
    """Settings of the pseudo mass by what they try, beside those of the grid."""
    context = context_of(preset)
    layers = PRESETS[preset]["num_hidden_layers"]
    return {
        "constant mass": {"hold": 0, "gamma": math.log1p(1 / mean_mass(1 / context, context))},
        "floor 10": {"floor": 10.0},
        "floor context / 2": {"floor": context / 2},
        "learned gamma": {"gamma": "learned"},
        "lower half of the layers": {"layers": list(range(layers // 2))},
        "upper half of the layers": {"layers": list(range(layers // 2, layers))},
    }


def mean_mass(gamma: float, context: int) -> float:
    """The pseudo mass of a row, infinite horizon, averaged over the rows of a context."""
    return sum(math.exp(-(i + 1) * gamma) for i in range(context)) / context / -math.expm1(-gamma)


def _job(size: Size, run: Record) -> Job:
    # A run that stands in several groups has one name, and is trained once.
    rate = run.get("learning_rate", size.learning_rate)
    arguments = {**run, "preset": size.preset, "steps": size.steps, "tokens": size.tokens}
    arguments["learning_rate"] = rate
    words = [run["group"], size.preset, run["position"], run["label"], run["context"], run["seed"]]
    if run["group"] == RATE:
        words.insert(-1, f"{rate:g}")
    name = "-".join(str(word).replace(" ", "_").replace("/", "over") for word in words)
    return Job(name, train_and_score, arguments, size.seconds)


def train_and_score(work: Path, **run: Any) -> Mapping[str, Any]:
    folder = trained(work, model_name(run), training_options(run))
    logs = evaluations(folder)
    curve = [[log["step"], round(log["eval_loss"], 5)] for log in logs]
    return {
        "model": folder.name,
        "loss": final_loss(folder),
        "curve": curve,
        "mask_ratio": logs[-1].get("eval_mask_ratio"),
    }


def training_options(run: Record) -> dict[str, Any]:
    """Of the training of a record, for :func:`~studies.models.trained`."""
    steps = run["steps"]
    return {
        "preset": run["preset"],
        "data": run["source"],
        "position": run["position"],
        "context": run["context"],
        "steps": steps,
        "batch_size": run["tokens"] // run["context"],
        "learning_rate": run["learning_rate"],
        "eval_every": max(1, steps // 8),
        "save_every": steps,
        "eval_tokens": CURVE_TOKENS,
        "final_eval_tokens": FINAL_TOKENS,
        "probe_tokens": run["context"],
        "seed": run["seed"],
        **run["settings"],
    }


def model_name(run: Record, options: Mapping[str, Any] | None = None) -> str:
    """Readable, and the same for every record with the same training.

    Args:
        options: of the training, by default those of :func:`training_options`.
    """
    options = training_options(run) if options is None else options
    words = [
        run["preset"],
        run["position"],
        run["settings"]["attention"],
        run["context"],
        run["seed"],
    ]
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()
    return "-".join([*map(str, words), digest[:8]])
