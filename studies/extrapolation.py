"""Reading far past the training length, with all keys, from a window, and by StreamingLLM's recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from stablemask.evaluation.perplexity import perplexity_of
from stablemask.evaluation.statistics import Estimate, estimate
from stablemask.evaluation.streaming import position_bins, sink_cache, streaming_losses
from stablemask.hf.loading import load_model
from stablemask.hf.settings import changed_settings
from stablemask.inference.streaming import window_cache
from stablemask.report.drawing import GRAY

from .kinds import KINDS, LABELS, line_style
from .language import PAIR, PLANS, model_name, training_options
from .language import jobs as language_jobs
from .language_section import GRID
from .models import corpus_of, trained
from .page import table
from .study import Claim, Job, Record, Section, Study, verdict

POSITIONS = ("rope", "alibi", "nope")
FACTOR = 16  # times the training length
SINKS = 4  # first tokens that StreamingLLM keeps
SAME = 0.01  # nats; as well as another is who does not lose so many, beyond doubt
TEXTS = {"small": 24, "gpu": 64}
ALL, WINDOW, STREAMING = "all keys", "window", "StreamingLLM"
FALLING = ", mass falling on"  # past the training length, where `hold` is None
SHOWN = (ALL, ALL + FALLING, WINDOW, WINDOW + FALLING, STREAMING)


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
    nats = {}
    for name in caches:
        cache, chunk = _CACHES[name.removesuffix(FALLING)](model, context)
        falling = name.endswith(FALLING)
        with changed_settings(model.config, hold=None) if falling else nullcontext():
            losses = streaming_losses(model, tokens, cache, chunk_size=chunk).double().mean(0)
        # The loss at index i is that of the token at position i + 1.
        nats[name] = [
            round(losses[start - 1 : end - 1].mean().item(), 5) for start, end in _bins(context)
        ]
    return {"bins": _bins(context), "nats": nats}


def _full(model: PreTrainedModel, context: int) -> tuple[Cache, int]:
    return DynamicCache(config=model.config), context


def _window(model: PreTrainedModel, context: int) -> tuple[Cache, int]:
    return window_cache(model, context), context


def _streaming(model: PreTrainedModel, context: int) -> tuple[Cache, int]:
    return sink_cache(model, context, num_sinks=SINKS), 1


_CACHES: dict[str, Callable[[PreTrainedModel, int], tuple[Cache, int]]] = {
    ALL: _full, WINDOW: _window, STREAMING: _streaming,
}  # fmt: skip


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
    """A table a cache and size, a figure by position, and the paper's claim about extrapolation."""
    presets = dict.fromkeys(record["preset"] for record in records)
    found = [_Found([r for r in records if r["preset"] == preset]) for preset in presets]
    first = records[0]
    parts = [
        f"The models of the study of language modelling, trained at {first['context']} tokens, read "
        f"{first['texts']} texts of {FACTOR * first['context']:,} tokens from their first token on: with all keys; "
        f"from a cache of the latest {first['context']} keys (*window*); with StreamingLLM's recipe, {SINKS} first "
        f"tokens and the latest keys, {first['context']} in all, positions counted within the cache. Past the training "
        "length a pseudo mass stays what it was at its end, or goes on *falling* (`hold` None). Each text is read "
        "once, and every token is scored.",
        f"Perplexity within the training length, and at {_STEPS} of it:",
        *(text for of in found for text in of.tables()),
        "{positions}",
    ]
    alt = "Perplexity by position, a panel for each position encoding and cache, softmax and StableMask"
    return Section(_claims(found), "\n\n".join(parts), {"positions": (_draw(found[0]), alt)})


_STEPS = f"{FACTOR // 2}x to {FACTOR}x"


class _Found:
    """Nats of every cache, kind and position encoding, by range of positions and seed, of one size."""

    def __init__(self, records: list[Record]) -> None:
        self.records = records
        self.bins: list[tuple[int, int]] = [tuple(b) for b in records[0]["bins"]]
        self.context = records[0]["context"]
        self.preset = records[0]["preset"]
        self.positions = [name for name in POSITIONS if any(r["position"] == name for r in records)]

    def tables(self) -> list[str]:
        """Markdown, one a cache."""
        head = ["", *(f"{name}, {part}" for name in self.positions for part in ("1x", _STEPS))]
        tables = []
        for cache in SHOWN:
            rows = [
                [LABELS[kind], *(self.text(cache, kind, *place) for place in self._places())]
                for kind in KINDS
            ]
            shown = [row for row in rows if any(row[1:])]
            if shown:
                tables.append(f"**{self.preset}, {cache}**\n\n{table(head, shown)}")
        return tables

    def _places(self) -> Iterator[tuple[str, bool]]:
        return product(self.positions, (False, True))

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

    def text(self, cache: str, kind: str, position: str, last: bool) -> str:
        nats = self.nats(cache, kind, position, last)
        return estimate([perplexity_of(value) for value in nats]).text(1) if nats else ""

    def difference(self, ours: tuple[str, str], theirs: tuple[str, str], position: str) -> Estimate:
        """Nats at the last doubling, (cache, kind) less another, seed by seed."""
        pairs = zip(
            self.nats(*ours, position, True), self.nats(*theirs, position, True), strict=True
        )
        return estimate([a - b for a, b in pairs])


def _claims(found: list[_Found]) -> list[Claim]:
    held, falling = (ALL, "stablemask"), (ALL + FALLING, "stablemask")
    window, window_falling = (WINDOW, "stablemask"), (WINDOW + FALLING, "stablemask")
    softmax, recipe = (ALL, "softmax"), (STREAMING, "softmax")
    as_published, ours = "its mass falling on, as published", "its mass held, our default"
    better = "StableMask extrapolates better than softmax, all keys kept"
    as_well = (
        "StableMask with a plain window does as well as softmax with StreamingLLM's first tokens"
    )
    return [
        _claim(f"{better}, {as_published}", found, falling, softmax, 0),
        _claim(f"{better}, {ours}", found, held, softmax, 0),
        _claim("Holding the mass is better than letting it fall on", found, held, falling, 0),
        _claim(f"{as_well}, {as_published}", found, window_falling, recipe, SAME),
        _claim(f"{as_well}, {ours}", found, window, recipe, SAME),
        _claim(
            "With its mass held StableMask needs no first tokens: they gain it nothing",
            found,
            window,
            (STREAMING, "stablemask"),
            SAME,
        ),
    ]


def _claim(
    statement: str,
    found: list[_Found],
    ours: tuple[str, str],
    theirs: tuple[str, str],
    limit: float,
) -> Claim:
    holds, measured = [], []
    for of in found:
        if of.curves(*theirs, of.positions[0]):
            differences = {name: of.difference(ours, theirs, name) for name in of.positions}
            holds += [difference.below(limit, SAME) for difference in differences.values()]
            texts = (f"{name} {difference.text(3)}" for name, difference in differences.items())
            measured.append(f"{of.preset}: {', '.join(texts)}")
    return Claim(statement, f"nats at {_STEPS}, less theirs: {'; '.join(measured)}", verdict(holds))


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
    figure.legend(
        list(handles.values()),
        [LABELS[kind] for kind in handles],
        loc="outside upper center",
        ncols=3,
    )
    return figure


STUDY = Study("extrapolation", "Past the training length", jobs, section)
