"""What the drawings of every report share: colours, style, labels, and the way into a page.

An attention kind has the same colour everywhere; models of one kind differ by their line. The colours
are from Okabe and Ito's palette, which the colour-blind can tell apart.
"""

import base64
import io
from typing import Any

import matplotlib
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

COLORS = {
    "softmax": "#d55e00",
    "stablemask": "#0072b2",
    "softmax1": "#009e73",
    "learned-sink": "#cc79a7",
}
MARKERS = {"softmax": "s", "stablemask": "o", "softmax1": "^", "learned-sink": "D"}
LINES = ("-", "--", ":", "-.")
GRAY = "#6b7280"

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
