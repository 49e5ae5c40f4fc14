"""What the page says of attention sinks: tables, figures and verdicts, all from the records."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..evaluation.sinks import even_first_token
from ..report.drawing import GRAY
from .kinds import LABELS, line_style
from .page import table
from .statistics import Estimate, estimate
from .study import Claim, Record, Section, Verdict

# How a block begins: where the text was cut, or with the end of a document.
CUT, END = "cut", "end"

# So many times what even attention gives the first token makes a sink of it.
SINK = 3

Measure = Callable[[Record], "float | None"]

_STARTS = {CUT: "packed blocks", END: "end token first"}
_INTRODUCTION = """\
Rows of softmax sum to 1, so a head with nothing to say must still look somewhere, and the first
token, which every row sees, becomes its sink. *Packed blocks* begin where the text was cut, as in
all of our training: their first token is arbitrary. With the *end token first* it is the same in
every block, which is where sinks are known to grow soonest.

*First token* is the mean attention that it gets from the rows after it, on validation text.
Attention that goes to a pseudo mass or a sink logit goes to no token at all (*mask ratio*). So that
this alone is not taken for a cure, the share of *real* attention is given too: what tokens receive,
made to sum to 1. *Delimiters* are tokens of punctuation and white space only; the real attention
that they receive is divided by what even attention would give them, in the layer with the most.
Activations and kurtosis (3 for a normal distribution) are of the hidden states behind a layer, the
layer with the most. Int8 is of weights and activations inside all layers, with a scale of
activations for each token (dynamic) or fixed beforehand (static)."""
_RULES = f"""\
Softmax has a sink where its head with the most gives the first token at least {SINK} times what
even attention does. StableMask mends it where its own figure is lower, of all attention and of real
attention; in part where of one alone. The other measures are compared likewise. Lower means that
the intervals are apart; of a single seed, that it is at most half, and what lies between half and
twice stays open."""


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

    def of(self, kind: str, measure: Measure) -> Estimate | None:
        """None where some record has no such measurement, or there is no record."""
        values = [measure(record) for record in self.records.get(kind, [])]
        found = [value for value in values if value is not None]
        return estimate(found) if found and len(found) == len(values) else None


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
    """How much perplexity rises."""

    def measure(record: Record) -> float | None:
        quantised = record[f"perplexity_int8_{activations}"]
        return None if quantised is None else quantised / record["perplexity"] - 1

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
    ("int8 dynamic, perplexity + %", _int8_loss("dynamic"), 2, 100),
    ("int8 static, perplexity + %", _int8_loss("static"), 2, 100),
]


def _table(size: _Size) -> str:
    rows = []
    for kind in size.records:
        cells = [
            "–" if (value := size.of(kind, measure)) is None else value.text(digits, scale)
            for _, measure, digits, scale in _COLUMNS
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
        _claim("Static int8 costs less perplexity with StableMask.", sizes, _judge_int8),
    ]


def _claim(
    statement: str, sizes: list[_Size], judge: Callable[[_Size], tuple[str, Verdict]]
) -> Claim:
    judged = [(size.title, *judge(size)) for size in sizes]
    measured = "; ".join(f"{title}: {text}" for title, text, _ in judged)
    return Claim(statement, measured, _joint([verdict for *_, verdict in judged]))


def _joint(verdicts: Sequence[Verdict]) -> Verdict:
    """What is open decides nothing, and those that disagree make a part."""
    decided = {verdict for verdict in verdicts if verdict != "open"}
    if not decided:
        return "open"
    return decided.pop() if len(decided) == 1 else "partly reproduced"


def _is_lower(one: Estimate | None, other: Estimate | None) -> Verdict:
    """Whether ``one`` is below ``other``: their intervals apart, or at most half for a single seed."""
    if one is None or other is None:
        return "open"
    if math.isnan(one.half_width) or math.isnan(other.half_width):
        if 2 * one.mean <= other.mean:
            return "reproduced"
        return "not reproduced" if one.mean >= 2 * other.mean else "open"
    return "reproduced" if one.high < other.low else "not reproduced"


def _has_sink(size: _Size) -> bool:
    largest = size.of("softmax", _peak("first_token_head"))
    return largest is not None and largest.mean >= SINK * size.even


def _judge_sink(size: _Size) -> tuple[str, Verdict]:
    largest = size.of("softmax", _peak("first_token_head"))
    if largest is None:
        return "softmax was not trained", "open"
    text = (
        f"the head with the most gives it {largest.text(1, 100)} %, "
        f"even attention {100 * size.even:.1f} %"
    )
    return text, "reproduced" if _has_sink(size) else "open"


def _judge_mended(size: _Size) -> tuple[str, Verdict]:
    if not _has_sink(size):
        return "softmax grew no sink that could be mended", "open"
    names = ("first_token_head", "first_token_real_head")
    text = " and ".join(
        f"{_pair(size, _peak(name), 1, 100)} % of {what} attention"
        for name, what in zip(names, ("all", "real"), strict=True)
    )
    return text, _joint([_compare(size, _peak(name)) for name in names])


def _judge_delimiters(size: _Size) -> tuple[str, Verdict]:
    measure = _peak("delimiters")
    return f"{_pair(size, measure, 2)} times even attention", _compare(size, measure)


def _judge_outliers(size: _Size) -> tuple[str, Verdict]:
    text = (
        f"largest activation {_pair(size, _peak('largest'), 1)}, "
        f"kurtosis {_pair(size, _peak('kurtosis'), 1)}"
    )
    return text, _joint([_compare(size, _peak(name)) for name in ("largest", "kurtosis")])


def _judge_int8(size: _Size) -> tuple[str, Verdict]:
    measure = _int8_loss("static")
    return f"+{_pair(size, measure, 2, 100)} %", _compare(size, measure)


def _compare(size: _Size, measure: Measure) -> Verdict:
    return _is_lower(size.of("stablemask", measure), size.of("softmax", measure))


def _pair(size: _Size, measure: Measure, digits: int, scale: float = 1) -> str:
    one, other = (size.of(kind, measure) for kind in ("stablemask", "softmax"))
    texts = ("not measured" if v is None else v.text(digits, scale) for v in (one, other))
    return " against softmax's ".join(texts)


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
