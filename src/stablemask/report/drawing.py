"""What the drawings of every report share: colours, lines, style, labels, and the way into a page.

An attention kind has the same colour everywhere; models of one kind differ by their line. The colours
are from Okabe and Ito's palette, which the colour-blind can tell apart. Legends stand in the page.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLORS = {
    "softmax": "#d55e00",
    "stablemask": "#0072b2",
    "stablemask-paper": "#56b4e9",
    "stablemask-zero": "#999999",
    "softmax1": "#009e73",
    "learned-sink": "#cc79a7",
    "key-sink": "#e69f00",
    "learned-token": "#7a5195",
    "fixed-token": "#b8860b",
    "head-gate": "#222222",
}
MARKERS = {
    "softmax": "s",
    "stablemask": "o",
    "stablemask-paper": "P",
    "stablemask-zero": "v",
    "softmax1": "^",
    "learned-sink": "D",
    "key-sink": "d",
    "learned-token": "<",
    "fixed-token": ">",
    "head-gate": "X",
}
GRAY = "#6b7280"
WIDTH = 4.8  # inches: a drawing fits a telephone, and two stand side by side on a wider screen

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": GRAY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "legend.frameon": False,
    "svg.hashsalt": "stablemask",  # the same numbers give the same bytes
}
# A square root keeps the many small shares of a row apart from zero.
MAP_COLORS = matplotlib.colormaps["magma_r"].with_extremes(bad="#eceff3")
MAP_NORM = PowerNorm(0.5, 0, 1)
SCALE_TICKS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)


class Line(NamedTuple):
    """How a model is drawn: for Matplotlib, in the words of a legend, and for an SVG's path."""

    color: str
    marker: str
    ls: str
    word: str
    dashes: str


_PATTERNS = (("-", "", ""), ("--", "dashed", "5 3"), (":", "dotted", "1.5 2"),
             ("-.", "dash-dotted", "5 2 1.5 2"))  # fmt: skip


def lines(kinds: Sequence[str]) -> list[Line]:
    """The line of each model: its kind's colour, another pattern where that kind came before."""
    before = [kinds[:index].count(kind) for index, kind in enumerate(kinds)]
    return [
        Line(COLORS[kind], MARKERS[kind], *_PATTERNS[same % len(_PATTERNS)])
        for kind, same in zip(kinds, before)
    ]


def chart(xlabel: str, ylabel: str = "", height: float = 3.1) -> tuple[Figure, Axes]:
    """A figure of one panel, with whole numbers along it."""
    figure = Figure((WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure, axes


def shade(share: float) -> tuple[str, str]:
    """Background and ink of a share from 0 to 1, as CSS colours."""
    red, green, blue, _ = MAP_COLORS(float(MAP_NORM(share)))
    ink = "#111827" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#fff"
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}", ink


def visible_token(token: str, longest: int = 10) -> str:
    """A token as a label: white space made visible, characters the font may lack replaced."""
    shown = token.translate(str.maketrans(" \n\r\t", "·↵↵→"))
    kept = [c if (ord(c) < 0x250 and c.isprintable()) or c in "·↵→" else "□" for c in shown]
    text = "".join(kept[:longest]) + ("…" if len(kept) > longest else "")
    return text.replace("$", r"\$")  # two would begin and end a formula


def svg_uri(figure: Figure) -> str:
    """A ``data:`` URI; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
