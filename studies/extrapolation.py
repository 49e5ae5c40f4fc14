"""Reading far past the training length, with all keys, from a window, and by StreamingLLM's recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from benchmarks.tables import table
from stablemask.evaluation.perplexity import perplexity_of
from stablemask.evaluation.statistics import Estimate, estimate
from stablemask.evaluation.streaming import position_bins, sink_cache, streaming_losses
from stablemask.hf.loading import load_model
from stablemask.hf.settings import changed_settings
from stablemask.inference.streaming import window_cache
from stablemask.report.drawing import GRAY

from .kinds import KINDS, kinds_legend, line_style
from .language import GRID, PAIR, PLANS, model_name, training_options
from .language import jobs as language_jobs
from .models import corpus_of, trained
from .scaling import log_length_scaling
from .study import Claim, Job, Record, Section
from .tables import joined, kinds_table

POSITIONS = ("rope", "alibi", "nope")
FACTOR = 16  # times the training length
SINKS = 4  # first tokens that StreamingLLM keeps
SAME = 0.01  # nats; as well as another is who does not lose so many, beyond doubt
TEXTS = {"small": 24, "gpu": 64}
ALL, WINDOW, STREAMING = "all keys", "window", "StreamingLLM"
FALLING = ", mass falling on"  # past the training length, where `hold` is None
SCALED = ", log-length"  # the scores times a logarithm of the length, past the training length
SHOWN = (ALL, ALL + FALLING, WINDOW, WINDOW + FALLING, STREAMING)
# Who is read with it: the authors' code scales so with RoPE alone.
SCALED_KINDS = (*PAIR, "stablemask-paper")


def jobs(scale: str, seeds: int) -> list[Job]:
    """One for each model that the language study compares, and whose positions go on."""
    found = []
    for job in language_jobs(scale, seeds):
        run = job.arguments
        if run["group"] == GRID and run["position"] in POSITIONS:
            caches = _caches(run["label"], run["preset"] == PLANS[scale].sizes[0].preset)
            arguments = {**run, "texts": TEXTS[scale], "caches": caches}
            name = job.name.removeprefix(f"{GRID}-")
            cost = 30 if STREAMING in caches else 5
            found.append(Job(name, read_past_the_context, arguments, cost))
            if run["position"] == "rope" and run["label"] in SCALED_KINDS:
                scaled = {**arguments, "caches": [ALL + SCALED]}
                found.append(Job(f"{name}-log-length", read_past_the_context, scaled, 5))
    return found


def _caches(kind: str, first: bool) -> list[str]:
    """``first`` is the first size, for the others have no time to read one token after another."""
    caches = [ALL, WINDOW]
    if kind in ("stablemask", "stablemask-slopes"):  # a finite horizon ends the mass by itself
        caches += [ALL + FALLING, WINDOW + FALLING]
    if kind in PAIR and first:
        caches.append(STREAMING)
    return caches


def read_past_the_context(
    work: Path, *, texts: int, caches: list[str], **run: Any
) -> Mapping[str, Any]:
    """Nats by position, one value a range of positions, for each cache."""
    folder = trained(work, model_name(run), training_options(run))
    model = load_model(str(folder), device="cuda" if torch.cuda.is_available() else "cpu")
    context = run["context"]
    tokens = _texts(run, texts, FACTOR * context + 1)
    ways = {
        FALLING: partial(changed_settings, model.config, hold=None),
        SCALED: partial(log_length_scaling, model, context),
    }
    nats = {}
    for name in caches:
        kept, comma, way = name.partition(",")
        cache, chunk = _CACHES[kept](model, context)
        with ways[comma + way]() if way else nullcontext():
            losses = streaming_losses(model, tokens, cache, chunk_size=chunk).double().mean(0)
        # The loss at index i is that of the token at position i + 1.
        nats[name] = [
            round(losses[start - 1 : end - 1].mean().item(), 5) for start, end in _bins(context)
        ]
    return {"bins": _bins(context), "nats": nats}


# What is kept of a text, and how many tokens are read at once.
_CACHES: dict[str, Callable[[PreTrainedModel, int], tuple[Cache, int]]] = {
    ALL: lambda model, context: (DynamicCache(config=model.config), context),
    WINDOW: lambda model, context: (window_cache(model, context), context),
    STREAMING: lambda model, context: (sink_cache(model, context, num_sinks=SINKS), 1),
}


def _bins(context: int) -> list[tuple[int, int]]:
    """Two to each doubling of the position, one of them ending with the training length."""
    inside = position_bins(context)
    return inside + position_bins(FACTOR * context + 1, first=context)


def _texts(run: Record, count: int, length: int) -> Tensor:
    """Pieces of the validation side, evenly spread over it, (count, length)."""
    tokens = corpus_of(training_options(run)).validation.tokens
    step = (len(tokens) - length) // max(count - 1, 1)
    pieces = [tokens[i * step : i * step + length].astype("int64") for i in range(count)]
    return torch.stack([torch.from_numpy(piece) for piece in pieces])


def section(records: list[Record]) -> Section:
    """A table a cache and size, a figure by position, and who loses less far out."""
    presets = dict.fromkeys(record["preset"] for record in records)
    found = [_Found([r for r in records if r["preset"] == preset]) for preset in presets]
    compared = [
        (statement, gaps, limit)
        for statement, ours, theirs, limit in _COMPARISONS
        if (gaps := _gaps(found, ours, theirs))
    ]
    cells = list(dict.fromkeys(cell for _, gaps, _ in compared for cell in gaps))
    rows = [
        [statement, *(gaps[cell].text(3) if cell in gaps else "" for cell in cells)]
        for statement, gaps, _ in compared
    ]
    return Section(
        [
            Claim(statement, [less.below(limit, SAME) for less in gaps.values()])
            for statement, gaps, limit in compared
        ],
        {
            "gaps": table([f"nats at {_STEPS}", *cells], rows),
            "perplexities": joined(text for of in found for text in of.tables()),
        },
        {"positions": _draw(found[0])},
        {
            "context": found[0].context,
            "factor": FACTOR,
            "far": _STEPS,
            "same": SAME,
            "sinks": SINKS,
            "texts": records[0]["texts"],
        },
    )


_STEPS = f"{FACTOR // 2}x to {FACTOR}x"
_HELD, _FALLS = (ALL, "stablemask"), (ALL + FALLING, "stablemask")
_FALLING, _OURS = "its mass falling on", "its mass held, our default"
_BETTER = "StableMask extrapolates better than softmax, all keys kept"
_WINDOWED = "StableMask read from a plain window extrapolates better than softmax read so"
_AS_WELL = "StableMask with a plain window does as well as softmax with StreamingLLM's first tokens"
# A statement, whose loss is to be lower than whose (a cache and a kind), and than theirs by how much more.
_COMPARISONS = (
    (f"{_BETTER}, as published", (ALL, "stablemask-paper"), (ALL, "softmax"), 0.0),
    (f"{_BETTER}, {_FALLING}", _FALLS, (ALL, "softmax"), 0.0),
    (f"{_BETTER}, {_OURS}", _HELD, (ALL, "softmax"), 0.0),
    *(
        (f"{_BETTER}, {words}, log-length scaling given to both", (ALL + SCALED, kind), (ALL + SCALED, "softmax"), 0.0)
        for kind, words in (("stablemask-paper", "as published"), ("stablemask", _OURS))
    ),
    ("Holding the mass is better than letting it fall on", _HELD, _FALLS, 0.0),
    *(
        (f"{_WINDOWED}, {words}", (WINDOW, kind), (WINDOW, "softmax"), 0.0)
        for kind, words in (("stablemask-paper", "as published"), ("stablemask", _OURS))
    ),
    (f"{_AS_WELL}, {_FALLING}", (WINDOW + FALLING, "stablemask"), (STREAMING, "softmax"), SAME),
    (f"{_AS_WELL}, {_OURS}", (WINDOW, "stablemask"), (STREAMING, "softmax"), SAME),
    (
        "With its mass held StableMask needs no first tokens: they gain it nothing",
        (WINDOW, "stablemask"),
        (STREAMING, "stablemask"),
        SAME,
    ),
)  # fmt: skip


class _Found:
    """Nats of every cache, kind and position encoding, by range of positions and seed, of one size."""

    def __init__(self, records: list[Record]) -> None:
        self.records = records
        self.bins: list[tuple[int, int]] = [tuple(b) for b in records[0]["bins"]]
        self.context = records[0]["context"]
        self.preset = records[0]["preset"]
        self.positions = [name for name in POSITIONS if any(r["position"] == name for r in records)]

    def tables(self) -> list[str]:
        """Perplexities, a table a cache."""
        read = {
            cache: [p for p in self.positions if any(self.curves(cache, k, p) for k in KINDS)]
            for cache in (*SHOWN, ALL + SCALED)
        }
        return [
            kinds_table(
                f"{self.preset}, {cache}",
                list(product(positions, (False, True))),
                partial(self.text, cache),
                lambda place: f"{place[0]}, {_STEPS if place[1] else '1x'}",
            )
            for cache, positions in read.items()
            if positions
        ]

    def curves(self, cache: str, kind: str, position: str) -> list[list[float]]:
        """Of each seed."""
        return [
            record["nats"][cache]
            for record in self.records
            if (record["label"], record["position"]) == (kind, position) and cache in record["nats"]
        ]

    def nats(self, cache: str, kind: str, position: str, last: bool) -> list[float]:
        """Of each seed, over the training length or over the last doubling."""
        end = FACTOR * self.context
        low, high = (end // 2, end + 1) if last else (1, self.context)
        chosen = [
            (index, stop - start)
            for index, (start, stop) in enumerate(self.bins)
            if low <= start and stop <= high
        ]
        total = sum(width for _, width in chosen)
        return [
            sum(curve[index] * width for index, width in chosen) / total
            for curve in self.curves(cache, kind, position)
        ]

    def text(self, cache: str, kind: str, place: tuple[str, bool]) -> str:
        nats = self.nats(cache, kind, *place)
        return estimate([perplexity_of(value) for value in nats]).text(1) if nats else ""

    def difference(self, ours: tuple[str, str], theirs: tuple[str, str], position: str) -> Estimate:
        """Nats at the last doubling, (cache, kind) less another, seed by seed."""
        pairs = zip(
            self.nats(*ours, position, True), self.nats(*theirs, position, True), strict=True
        )
        return estimate([a - b for a, b in pairs])


def _gaps(
    found: list[_Found], ours: tuple[str, str], theirs: tuple[str, str]
) -> dict[str, Estimate]:
    """By size and position encoding."""
    return {
        f"{of.preset} {position}": of.difference(ours, theirs, position)
        for of in found
        for position in of.positions
        if of.curves(*ours, position) and of.curves(*theirs, position)
    }


def _draw(found: _Found) -> Figure:
    caches, positions = SHOWN, found.positions
    figure = Figure((3.3 * len(positions), 2.1 * len(caches) + 0.6), layout="constrained")
    panels = figure.subplots(len(caches), len(positions), sharex=True, sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    for row, cache in zip(panels, caches, strict=True):
        for axes, position in zip(row, positions, strict=True):
            for kind in KINDS:
                curves = found.curves(cache, kind, position)
                if not curves:
                    continue
                middle = [math.sqrt(start * (stop - 1)) for start, stop in found.bins]
                means = [
                    perplexity_of(sum(values) / len(values)) for values in zip(*curves, strict=True)
                ]
                shown = [(x, y) for x, y in zip(middle, means, strict=True) if x >= 8]
                (handles[kind],) = axes.plot(*zip(*shown, strict=True), **line_style(kind))
            axes.axvline(found.context, color=GRAY, lw=1, ls=":")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda perplexity, _: f"{perplexity:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.set_title(f"{position}, {cache}")
    figure.supxlabel("position (tokens from the start); dotted: the training length", fontsize=10)
    figure.supylabel("perplexity of the validation text", fontsize=10)
    kinds_legend(figure, handles)
    return figure
