"""What the page says of attention sinks: tables, figures and verdicts, all from the records."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stablemask.evaluation.sinks import even_first_token
from stablemask.evaluation.statistics import estimate
from stablemask.report.drawing import GRAY

from .kinds import LABELS, line_style
from .page import table
from .study import Claim, Record, Section, verdict

# How a block begins: where the text was cut, or with the end of a document.
CUT, END = "cut", "end"

# So many times what even attention gives the first token makes a sink of it.
SINK = 3

# A mean that is lower by less is not lower: of a logarithm, and of nats.
MARGIN, INT8_MARGIN = 0.05, 0.001

Measure = Callable[[Record], "float | None"]

_STARTS = {CUT: "packed blocks", END: "end token first"}
_INTRODUCTION = """\
Rows of softmax sum to 1, so a head with nothing to say must still look somewhere, and the first
token, which every row sees, becomes its sink. *Packed blocks* begin where the text was cut, as in
all of our training: their first token is arbitrary. With the *end token first* it is the same in
every block, which is where sinks are known to grow soonest. The learning rate is high, for at a lower
one a sink takes longer to grow than two cores have time ([log](log/2026-11.md)).

*First token* is the mean attention that it gets from the rows after it, on validation text.
Attention that goes to a pseudo mass or a sink logit goes to no token at all (*mask ratio*). So that
this alone is not taken for a cure, the share of *real* attention is given too: what tokens receive,
made to sum to 1. *Delimiters* are tokens of punctuation and white space only; the real attention
that they receive is divided by what even attention would give them, in the layer with the most.
Activations and kurtosis (3 for a normal distribution) are of the hidden states behind a layer, the
layer with the most. Int8 is of weights and activations inside all layers, with a scale of
activations for each token (dynamic) or fixed beforehand (static)."""
_RULES = f"""\
Softmax has a sink where in every seed its head with the most gives the first token at least {SINK}
times what even attention does. StableMask mends it where its own figure is lower, of all attention
and of real attention; in part where of one alone. The other measures are compared likewise. Lower
means that the whole interval of the differences is below 0, seed by seed, of logarithms, and for
int8 of nats. Where only the mean is, by {100 * MARGIN:.0f} % or more (int8: {INT8_MARGIN} nats), that stays open, and so
does whatever was trained with one seed only."""


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
        self, measure: Measure, margin: float, scale: Callable[[float], float] = math.log
    ) -> list[bool | None]:
        """Whether StableMask's is lower than softmax's; nothing where that was not measured."""
        pairs = zip(self.values("stablemask", measure), self.values("softmax", measure))
        differences = [scale(ours) - scale(theirs) for ours, theirs in pairs]
        return [estimate(differences).below(0, margin)] if len(differences) > 1 else []


def section(records: list[Record]) -> Section:
    sizes = _sizes(records)
    return Section(
        claims=_claims(sizes),
        body="\n\n".join(
            [_INTRODUCTION, *(_table(size) for size in sizes), _RULES, "{steps}", "{layers}"]
        ),
        figures={
            "steps": (_steps_figure(sizes), "First-token attention over training, by attention"),
            "layers": (
                _layers_figure(sizes),
                "Attention on the first token and on delimiters by layer, by attention",
            ),
        },
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


def _table(size: _Size) -> str:
    rows = []
    for kind in size.records:
        cells = [
            size.text(kind, measure, digits, scale) or "–" for _, measure, digits, scale in _COLUMNS
        ]
        rows.append([LABELS[kind], *cells])
    one = next(iter(size.records.values()))[0]
    return (
        f"**{size.title}**, {one['steps']:,} steps of {one['batch_size']} sequences of {one['context']} tokens, "
        f"learning rate {one['learning_rate']:g}: even attention would give the first token "
        f"{100 * size.even:.1f} %.\n\n"
        + table(["attention", *(head for head, *_ in _COLUMNS)], rows)
    )


def _claims(sizes: list[_Size]) -> list[Claim]:
    return [
        _claim("Softmax gives disproportionate attention to the first token.", sizes, _judge_sink),
        _claim("StableMask mends it.", sizes, _judge_mended),
        _claim("Delimiters receive less attention with StableMask.", sizes, _judge_delimiters),
        _claim("Hidden states have smaller outliers with StableMask.", sizes, _judge_outliers),
        _claim("Static int8 costs less with StableMask.", sizes, _judge_int8),
    ]


Judgement = tuple[str, "list[bool | None]"]


def _claim(statement: str, sizes: list[_Size], judge: Callable[[_Size], Judgement]) -> Claim:
    judged = [(size, *judge(size)) for size in sizes]
    measured = "; ".join(f"{size.title}: {text}" for size, text, _ in judged)
    return Claim(statement, measured, verdict([hold for *_, holds in judged for hold in holds]))


def _judge_sink(size: _Size) -> Judgement:
    found = size.sinks()
    text = (
        f"the head with the most gives it {size.text('softmax', _peak('first_token_head'), 1, 100)} %, "
        f"even attention {100 * size.even:.1f} %; a sink in {sum(found)} of {len(found)} seeds"
    )
    return text, [*found] if any(found) and len(found) > 1 else []


def _judge_mended(size: _Size) -> Judgement:
    if not size.has_sink:
        return "softmax grew no sink that could be mended", []
    measures = [_peak(name) for name in ("first_token_head", "first_token_real_head")]
    text = " and ".join(
        f"{_pair(size, measure, 1, 100)} % of {what} attention"
        for measure, what in zip(measures, ("all", "real"), strict=True)
    )
    return text, [hold for measure in measures for hold in size.is_lower(measure, MARGIN)]


def _judge_delimiters(size: _Size) -> Judgement:
    measure = _peak("delimiters")
    return f"{_pair(size, measure, 2)} times even attention", size.is_lower(measure, MARGIN)


def _judge_outliers(size: _Size) -> Judgement:
    names = ("largest", "kurtosis")
    text = (
        f"largest activation {_pair(size, _peak('largest'), 1)}, "
        f"kurtosis {_pair(size, _peak('kurtosis'), 1)}"
    )
    return text, [hold for name in names for hold in size.is_lower(_peak(name), MARGIN)]


def _judge_int8(size: _Size) -> Judgement:
    measure = _int8_loss("static")
    return f"{_pair(size, measure, 4)} nats", size.is_lower(measure, INT8_MARGIN, float)


def _pair(size: _Size, measure: Measure, digits: int, scale: float = 1) -> str:
    texts = (size.text(kind, measure, digits, scale) for kind in ("stablemask", "softmax"))
    return " against softmax's ".join(text or "not measured" for text in texts)


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
