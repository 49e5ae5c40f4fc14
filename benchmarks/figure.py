"""Figures of a run: ratios to stock SDPA, or peak memory, by length, on logarithmic axes.

The colours are from Okabe and Ito's palette, which the colour-blind can tell apart; every line has a
marker of its own besides.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from stablemask.writing import whole_file

from .measure import DECODE, TRAINING


class Line(NamedTuple):
    """How a row is called and drawn: ours drawn through, the definition dashed, what others wrote dotted."""

    label: str
    color: str
    marker: str
    ls: str


SDPA = "sdpa"
LINES = {
    SDPA: Line("softmax, stock SDPA", "#6b7280", "", "-"),
    "stablemask": Line("StableMask, this package", "#0072b2", "o", "-"),
    "learned sink": Line("learned sink, this package", "#009e73", "s", "-"),
    "definition": Line("the paper's formula, dense", "#d55e00", "D", "--"),
    "softmax-n flash": Line("flash-attention-softmax-n", "#e69f00", "<", ":"),
    "softmax-n slow": Line("flash-attention-softmax-n, slow path", "#e69f00", ">", ":"),
    "x-transformers": Line("x-transformers, learned sink", "#cc79a7", "P", ":"),
    "gpt-oss eager": Line("Transformers, gpt-oss eager", "#000000", "X", ":"),
    "flex lse": Line("FlexAttention, sink through its lse", "#56b4e9", "^", ":"),
    "flex zero key": Line("FlexAttention, sink as a key", "#56b4e9", "v", ":"),
}
# What is drawn, by a record's field: the label of its axis, and the numbers along it.
MEASURES = {"ratio": ("time / time of stock SDPA", "x"), "mib": ("peak memory (MiB)", "")}
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#6b7280",
    "axes.grid": True, "grid.color": "#e5e7eb",
}  # fmt: skip


class Panels(NamedTuple):
    """Of a figure one line, a panel for each dtype, each a curve by ``kv_len`` of each ``row``.

    Attributes:
        measure: the field that is drawn, of :data:`MEASURES`.
    """

    title: str
    records: Sequence[Mapping[str, Any]]
    measure: str = "ratio"
    along: str = "sequence length (tokens)"


def save_figure(result: dict[str, Any], path: Path) -> None:
    """Draw the first head_dim and group of a run, if it timed any; the format is the suffix of ``path``."""
    timed = [
        record
        for record in (*result.get("attention", ()), *result.get("decode", ()))
        if record["row"] in LINES and record["row"] != SDPA and record["ratio"] is not None
    ]
    if not timed:
        return
    first = timed[0]
    groups = f", {first['groups']} to a key head" if first["groups"] > 1 else ""
    shape = ("head_dim", "groups")
    shown = [r for r in timed if all(r[name] == first[name] for name in shape)]
    training = [r for r in shown if r["pass"] == TRAINING]
    decode = [r for r in shown if r["pass"] == DECODE and r["batch"] == 1]
    lines = [
        Panels("forward and backward", training),
        Panels("decode of one token, batch 1", decode, along="keys in the cache (tokens)"),
    ]
    heading = (
        "Attention with a sink against F.scaled_dot_product_attention without one\n"
        f"{result['hardware']}; PyTorch {result['versions']['torch']}; heads of "
        f"{first['head_dim']}{groups}"
    )
    with matplotlib.rc_context(STYLE), whole_file(path) as partial:
        draw(lines, heading).savefig(partial, dpi=160)


def draw(panels: Iterable[Panels], heading: str, looks: Mapping[str, Line] = LINES) -> Figure:
    """A line of panels for each measure that has records, a column for each dtype, one legend.

    Args:
        looks: of each row that is drawn; others are left out.
    """
    lines = [line for line in panels if line.records]
    dtypes = list(dict.fromkeys(record["dtype"] for line in lines for record in line.records))
    figure = Figure((4.4 * len(dtypes), 3.1 * len(lines) + 1.5), layout="constrained")
    grid = figure.subplots(len(lines), len(dtypes), squeeze=False, sharey="row")
    handles: dict[str, Any] = {}
    for line, row in zip(lines, grid, strict=True):
        for dtype, axes in zip(dtypes, row, strict=True):
            axes.set(title=f"{line.title}, {dtype}", xlabel=line.along)
            of_dtype = [record for record in line.records if record["dtype"] == dtype]
            if line.measure == "ratio":
                handles[SDPA] = axes.axhline(1, color=LINES[SDPA].color, lw=1)
            _draw_curves(axes, of_dtype, line.measure, looks, handles)
        _scale(row[0], line)
    figure.suptitle(heading, fontsize="medium")
    shown = {name: look for name, look in {SDPA: LINES[SDPA], **looks}.items() if name in handles}
    figure.legend(
        [handles[name] for name in shown], [look.label for look in shown.values()],
        loc="outside lower center", ncols=2, frameon=False,
    )  # fmt: skip
    return figure


def _draw_curves(
    axes: Axes,
    records: Sequence[Mapping[str, Any]],
    measure: str,
    looks: Mapping[str, Line],
    handles: dict[str, Any],
) -> None:
    for row, look in looks.items():
        points = sorted((r["kv_len"], r[measure]) for r in records if r["row"] == row)
        if points:
            (handles[row],) = axes.plot(
                *zip(*points, strict=True), color=look.color, marker=look.marker, ls=look.ls, lw=1.6,
                ms=5, zorder=3 if look.ls == "-" else 2,
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    lengths = sorted({record["kv_len"] for record in records})
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())


def _scale(axes: Axes, line: Panels) -> None:
    values = [record[line.measure] for record in line.records]
    label, unit = MEASURES[line.measure]
    axes.set(yscale="log", ylabel=label)
    if line.measure == "ratio":
        axes.set_ylim(min(0.9, 0.9 * min(values)), max(1.3, 1.2 * max(values)))
    few = max(values) > 30 * min(values)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}{unit}")
    axes.yaxis.set_minor_locator(NullLocator())
