"""Reading far past the training length, with all keys, from a window, and by StreamingLLM's recipe."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from ..evaluation.streaming import position_bins, sink_cache, streaming_losses
from ..hf.loading import load_model
from ..inference.streaming import mass_held, window_cache
from ..report.drawing import GRAY
from .kinds import KINDS, LABELS, line_style
from .language import GRID, PAIR, PLANS, model_name, training_options
from .language import jobs as language_jobs
from .models import corpus_of, trained
from .page import table
from .statistics import Estimate, estimate
from .study import Claim, Job, Record, Section, Study, verdict

POSITIONS = ("rope", "alibi", "nope")
FACTOR = 16  # times the training length
SINKS = 4  # first tokens that StreamingLLM keeps
SAME = 0.01  # nats; as well as another is who does not lose so many, beyond doubt
TEXTS = {"small": 24, "gpu": 64}
ALL, WINDOW, STREAMING = "all keys", "window", "StreamingLLM"
HELD = ", mass held"  # at the end of the training length, as `stablemask generate --window` does


def jobs(scale: str, seeds: int) -> list[Job]:
    """One for each model of the first size that the language study trains, and whose positions go on."""
    first = PLANS[scale].sizes[0]
    return [
        Job(
            job.name.removeprefix(f"{GRID}-"),
            read_past_the_context,
            {**job.arguments, "texts": TEXTS[scale], "caches": _caches(job.arguments["label"])},
            30 if job.arguments["label"] in PAIR else 4,
        )
        for job in language_jobs(scale, seeds)
        if job.arguments["group"] == GRID
        and job.arguments["preset"] == first.preset
        and job.arguments["position"] in POSITIONS
    ]


def _caches(kind: str) -> list[str]:
    caches = [ALL, WINDOW]
    if kind.startswith("stablemask"):
        caches += [ALL + HELD, WINDOW + HELD]
    if kind in PAIR:  # one token at a time, so not for every model
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
        cache, chunk = _CACHES[name.removesuffix(HELD)](model, context)
        with mass_held(model, context) if name.endswith(HELD) else nullcontext():
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
SHOWN = (ALL, ALL + HELD, WINDOW, WINDOW + HELD, STREAMING)


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
    """A table a cache, a figure by position, and the paper's claim about extrapolation."""
    found = _Found(records)
    kinds = [kind for kind in KINDS if any(record["label"] == kind for record in records)]
    positions = [name for name in POSITIONS if any(r["position"] == name for r in records)]
    context = records[0]["context"]
    steps = f"{FACTOR // 2}x to {FACTOR}x"
    parts = [
        f"The {records[0]['preset']} models of the study of language modelling, trained at {context} tokens, read "
        f"{records[0]['texts']} texts of {FACTOR * context:,} tokens from their first token on: with all keys; "
        f"from a cache of the latest {context} keys (*window*); with StreamingLLM's recipe, {SINKS} first tokens and "
        f"the latest keys, {context} in all, positions counted within the cache. A pseudo mass goes on falling past the "
        "training length, or is *held* where it was at its end. Each text is read once, and every token is scored.",
        f"Perplexity within the training length, and at {steps} of it:",
    ]
    head = ["", *(f"{position}, {part}" for position in positions for part in ("1x", steps))]
    for cache in SHOWN:
        rows = []
        for kind in kinds:
            cells = [
                found.text(cache, kind, position, last)
                for position in positions
                for last in (False, True)
            ]
            if any(cell != "" for cell in cells):
                rows.append([LABELS[kind], *cells])
        if rows:
            parts.append(f"**{cache}**\n\n{table(head, rows)}")
    parts.append("{positions}")
    figure = _draw(found, positions, context)
    alt = "Perplexity by position, a panel for each position encoding and cache, softmax and StableMask"
    return Section(_claims(found, positions), "\n\n".join(parts), {"positions": (figure, alt)})


class _Found:
    """Nats of every cache, kind and position encoding, by range of positions and seed."""

    def __init__(self, records: list[Record]) -> None:
        self.records = records
        self.bins: list[tuple[int, int]] = [tuple(b) for b in records[0]["bins"]]
        self.context = records[0]["context"]

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
        return estimate([math.exp(value) for value in nats]).text(1) if nats else ""

    def difference(self, ours: tuple[str, str], theirs: tuple[str, str], position: str) -> Estimate:
        """Nats at the last doubling, (cache, kind) less another, seed by seed."""
        pairs = zip(
            self.nats(*ours, position, True), self.nats(*theirs, position, True), strict=True
        )
        return estimate([a - b for a, b in pairs])


def _claims(found: _Found, positions: list[str]) -> list[Claim]:
    claims = []
    plain, held = (ALL, "stablemask"), (ALL + HELD, "stablemask")
    window_held = (WINDOW + HELD, "stablemask")
    recipe = (STREAMING, "softmax")
    better = "StableMask extrapolates better than softmax, all keys kept"
    for statement, ours, theirs in (
        (better, plain, (ALL, "softmax")),
        (f"{better} and its mass held", held, (ALL, "softmax")),
        (
            "StableMask with a plain window does as well as softmax with StreamingLLM's first tokens",
            (WINDOW, "stablemask"),
            recipe,
        ),
        ("It does so with its mass held", window_held, recipe),
        (
            "With its mass held StableMask needs no first tokens: they gain it nothing",
            window_held,
            (STREAMING, "stablemask"),
        ),
    ):
        differences = {p: found.difference(ours, theirs, p) for p in positions}
        limit = 0 if statement.startswith(better) else SAME
        holds = [d.below(limit, SAME) for d in differences.values()]
        measured = "; ".join(f"{p} {d.text(3)}" for p, d in differences.items())
        claims.append(
            Claim(
                statement,
                f"nats at {FACTOR // 2}x to {FACTOR}x, less theirs: {measured}",
                verdict(holds),
            )
        )
    return claims


def _draw(found: _Found, positions: list[str], context: int) -> Figure:
    caches = SHOWN
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
                    math.exp(sum(values) / len(values)) for values in zip(*curves, strict=True)
                ]
                shown = [(x, y) for x, y in zip(middle, means, strict=True) if x >= 8]
                (handles[kind],) = axes.plot(*zip(*shown, strict=True), **line_style(kind))
            axes.axvline(context, color=GRAY, lw=1, ls=":")
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
