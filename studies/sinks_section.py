"""Attention sinks: claims, tables and figures, all from the records."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.tables import records_table, table
from stablemask.evaluation.sinks import even_first_token
from stablemask.evaluation.statistics import estimate
from stablemask.report.drawing import GRAY

from .kinds import LABELS, line_style
from .sinks import CUT, END
from .study import Claim, Record, Section
from .tables import joined

# So many times what even attention gives the first token makes a sink of it.
SINK = 3

# A mean that is lower by less is not lower: of a logarithm, and of nats.
MARGIN, INT8_MARGIN = 0.05, 0.001

Measure = Callable[[Record], "float | None"]

_STARTS = {CUT: "packed blocks", END: "end token first"}


@dataclass(frozen=True)
class _Size:
    """The records of one size of model whose blocks begin alike, by kind."""

    preset: str
    start: str
    records: dict[str, list[Record]]

    @property
    def title(self) -> str:
        return f"{self.preset}, {_STARTS[self.start]}"

    @property
    def even(self) -> float:
        """What even attention gives the first token."""
        return even_first_token(next(iter(self.records.values()))[0]["context"])

    @property
    def has_sink(self) -> bool:
        """Softmax, in every seed."""
        return bool(found := self.sinks()) and all(found)

    def sinks(self) -> list[bool]:
        """Whether softmax has one, by seed."""
        shares = self.values("softmax", _peak("first_token_head"))
        return [share >= SINK * self.even for share in shares]

    def values(self, kind: str, measure: Measure) -> list[float]:
        """By seed; none where some record has no such measurement, or there is no record."""
        values = [measure(record) for record in self.records.get(kind, [])]
        found = [value for value in values if value is not None]
        return found if len(found) == len(values) else []

    def text(self, kind: str, measure: Measure, digits: int, scale: float = 1) -> str:
        values = self.values(kind, measure)
        return estimate(values).text(digits, scale) if values else ""

    def is_lower(
        self, measure: Measure, margin: float, scale: Callable[[float], float]
    ) -> list[bool | None]:
        """Whether StableMask's is lower than softmax's; nothing where that was not measured."""
        pairs = zip(self.values("stablemask", measure), self.values("softmax", measure))
        differences = [scale(ours) - scale(theirs) for ours, theirs in pairs]
        return [estimate(differences).below(0, margin)] if len(differences) > 1 else []


def section(records: list[Record]) -> Section:
    sizes = _sizes(records)
    return Section(
        _claims(sizes),
        {
            "trainings": records_table(map(_training, sizes), _TRAINING),
            "measures": joined(map(_table, sizes)),
        },
        {"steps": _steps_figure(sizes), "layers": _layers_figure(sizes)},
        {"sink": SINK, "margin": round(100 * MARGIN), "int8_margin": INT8_MARGIN},
    )


def _sizes(records: list[Record]) -> list[_Size]:
    found: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for record in records:
        group = found.setdefault((record["preset"], record["start"]), {})
        group.setdefault(record["kind"], []).append(record)
    return [_Size(*group, kinds) for group, kinds in found.items()]


def _peak(name: str) -> Measure:
    """That of the layer with the most."""
    return lambda record: max(record[name])


def _mean(name: str) -> Measure:
    """Over layers."""
    return lambda record: sum(record[name]) / len(record[name])


def _int8_loss(activations: str) -> Measure:
    """By how many nats the loss rises."""

    def measure(record: Record) -> float | None:
        quantised = record[f"perplexity_int8_{activations}"]
        return None if quantised is None else math.log(quantised / record["perplexity"])

    return measure


# Head of a column, what stands in it, digits, and the scale that it is shown at.
_COLUMNS: list[tuple[str, Measure, int, float]] = [
    ("perplexity", lambda record: record["perplexity"], 2, 1),
    ("first token, mean, %", _mean("first_token"), 1, 100),
    ("first token, largest head, %", _peak("first_token_head"), 1, 100),
    ("the same of real attention, %", _peak("first_token_real_head"), 1, 100),
    ("delimiters, × even", _peak("delimiters"), 2, 1),
    ("mask ratio, %", _mean("mask_ratio"), 1, 100),
    ("largest activation", _peak("largest"), 1, 1),
    ("kurtosis", _peak("kurtosis"), 1, 1),
    ("int8 dynamic, nats", _int8_loss("dynamic"), 4, 1),
    ("int8 static, nats", _int8_loss("static"), 4, 1),
]


_TRAINING = (
    ("", "{title}"), ("steps", "{steps:,}"), ("sequences a step", "{batch_size}"),
    ("tokens a sequence", "{context}"), ("learning rate", "{learning_rate:g}"),
    ("even attention", "{even:.1%}"), ("seeds with a sink", "{sinks}"),
)  # fmt: skip


def _training(size: _Size) -> Record:
    sinks, one = size.sinks(), next(iter(size.records.values()))[0]
    return {**one, "title": size.title, "even": size.even, "sinks": f"{sum(sinks)} of {len(sinks)}"}


def _table(size: _Size) -> str:
    rows = []
    for kind in size.records:
        cells = [
            size.text(kind, measure, digits, scale) or "–" for _, measure, digits, scale in _COLUMNS
        ]
        rows.append([LABELS[kind], *cells])
    return table([size.title, *(head for head, *_ in _COLUMNS)], rows)


def _claims(sizes: list[_Size]) -> list[Claim]:
    def lower(
        measures: Sequence[Measure],
        margin: float = MARGIN,
        scale: Callable[[float], float] = math.log,
        among: Sequence[_Size] = sizes,
    ) -> list[bool | None]:
        return [
            hold
            for size in among
            for measure in measures
            for hold in size.is_lower(measure, margin, scale)
        ]

    sinks = [size.sinks() for size in sizes]
    shares = [_peak(name) for name in ("first_token_head", "first_token_real_head")]
    found: dict[str, Sequence[bool | None]] = {
        "Softmax gives disproportionate attention to the first token.": [
            has for seeds in sinks if any(seeds) and len(seeds) > 1 for has in seeds
        ],
        "StableMask mends it.": lower(shares, among=[size for size in sizes if size.has_sink]),
        "Delimiters receive less attention with StableMask.": lower([_peak("delimiters")]),
        "Hidden states have smaller outliers with StableMask.": lower(
            [_peak("largest"), _peak("kurtosis")]
        ),
        "Static int8 costs less with StableMask.": lower(
            [_int8_loss("static")], INT8_MARGIN, float
        ),
    }
    return [Claim(statement, holds) for statement, holds in found.items()]


def _steps_figure(sizes: list[_Size]) -> Figure:
    figure = Figure(figsize=(max(5.4, 4.2 * len(sizes)), 3.8), layout="constrained")
    panels = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
    for size, axes in zip(sizes, panels, strict=True):
        for kind, records in size.records.items():
            curves = [record["curve"] for record in records]
            _line(axes, kind, curves[0]["step"], [curve["first_token_head"] for curve in curves])
        _even(axes, 100 * size.even)
        axes.set(title=size.title, xlabel="training step")
    panels[0].set_ylabel("attention on the first token,\nlargest head (%)")
    _legend(figure, panels[0])
    return figure


def _layers_figure(sizes: list[_Size]) -> Figure:
    panels = (
        ("first_token_head", 100.0, "first token, largest head (%)"),
        ("first_token_real", 100.0, "first token, real attention (%)"),
        ("delimiters", 1.0, "delimiters (× even attention)"),
    )
    figure = Figure(figsize=(10, 3.6 * len(sizes)), layout="constrained")
    grid = figure.subplots(len(sizes), len(panels), squeeze=False)
    for size, row in zip(sizes, grid, strict=True):
        for axes, (name, scale, label) in zip(row, panels, strict=True):
            for kind, records in size.records.items():
                values = [record[name] for record in records]
                _line(axes, kind, list(range(len(values[0]))), values, scale)
            _even(axes, 100 * size.even if scale == 100 else 1)
            axes.set(xlabel="layer", ylabel=label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        row[0].set_title(size.title)
    _legend(figure, grid[0, 0])
    return figure


def _line(
    axes: Axes, kind: str, x: list[int], seeds: list[list[float]], scale: float = 100
) -> None:
    """The mean over seeds, and a band from the lowest to the highest."""
    values = scale * np.array(seeds)
    style: dict[str, Any] = {**line_style(kind)}
    axes.plot(x, values.mean(0), label=LABELS[kind], markevery=max(1, len(x) // 8), **style)
    if len(seeds) > 1:
        axes.fill_between(x, values.min(0), values.max(0), color=style["color"], alpha=0.12, lw=0)


def _even(axes: Axes, level: float) -> None:
    axes.axhline(level, color=GRAY, ls=":", lw=1.4, label="even attention")
    axes.set_ylim(bottom=0)


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
