"""The figures of an inspection, as ``data:`` URIs and as the paths of small SVGs.

Shapes: L layers, H heads, n tokens.
"""

import base64
import io
from collections.abc import Iterator, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
)
from PIL import Image

from .drawing import (
    COLORS,
    MAP_COLORS,
    MAP_NORM,
    SCALE_TICKS,
    STYLE,
    WIDTH,
    Line,
    chart,
    lines,
    svg_uri,
)
from .inspection import SHADES, Inspection

# Of a panel of the mask ratio, in its own units.
PANEL_WIDTH, PANEL_HEIGHT = 120, 60


def layer_figures(inspections: Sequence[Inspection]) -> Iterator[tuple[str, str]]:
    """A title, and a chart of all models by layer: attention, what carries no value, outliers."""
    shares = {"Attention on the first token": lambda layer: layer.first_token.mean()}
    if any(one.pseudo for one in inspections):
        shares["Mask ratio"] = lambda layer: layer.pseudo.mean()
    charts: dict[str, list[tuple[Sequence[int], Sequence[float]]]] = {
        title: [
            ([layer.layer for layer in one.layers], [float(share(layer)) for layer in one.layers])
            for one in inspections
        ]
        for title, share in shares.items()
    }
    for title, name in (("Largest activation", "largest"), ("Kurtosis", "kurtosis")):
        numbers = [getattr(one.outliers, name).tolist() for one in inspections]
        charts[title] = [(range(len(by_layer)), by_layer) for by_layer in numbers]
    styles = lines([one.attention for one in inspections])
    with matplotlib.rc_context(STYLE):
        for title, curves in charts.items():
            yield title, svg_uri(_layer_figure(curves, styles, as_share=title in shares))


def _layer_figure(
    curves: Sequence[tuple[Sequence[int], Sequence[float]]],
    styles: Sequence[Line],
    as_share: bool,
) -> Figure:
    figure, axes = chart("layer", height=2.6)
    for (layers, numbers), line in zip(curves, styles, strict=True):
        axes.plot(layers, numbers, color=line.color, ls=line.ls, marker="o", markersize=3)
    if as_share:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))
    else:
        every = [number for _, numbers in curves for number in numbers]
        if max(every) > 10 * min(every) > 0:  # less, and a logarithmic scale has one number on it
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    return figure


def _plain(number: float, _: int | None = None) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def sink_figures(inspections: Sequence[Inspection]) -> list[str]:
    """First-token attention of each model by layer and head, with its mean by layer; one scale."""
    highest = max(float(layer.first_token.mean()) for one in inspections for layer in one.layers)
    with matplotlib.rc_context(STYLE):
        return [svg_uri(_sink_figure(one, highest)) for one in inspections]


def _sink_figure(inspection: Inspection, highest: float) -> Figure:
    layers = inspection.layers
    heads = max(len(layer.first_token) for layer in layers)
    shares = np.full((len(layers), heads), np.nan)
    for row, layer in zip(shares, layers, strict=True):
        row[: len(layer.first_token)] = layer.first_token
    figure = Figure((WIDTH, 1.6 + min(0.16 * len(layers), 9)), layout="constrained")
    grid, bars = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    image = grid.imshow(
        shares, aspect="auto", cmap=MAP_COLORS, norm=MAP_NORM, interpolation="nearest"
    )
    rows = np.arange(len(layers))
    bars.barh(rows, np.nanmean(shares, axis=1), 0.8, color=COLORS[inspection.attention])
    bars.set(xlim=(0, 1.05 * highest), title="mean")
    bars.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    bars.xaxis.set_major_locator(MaxNLocator(2))
    bars.grid(axis="y", visible=False)
    grid.grid(visible=False)
    grid.set(title="by head", xlabel="head", ylabel="layer")
    grid.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    shown = rows[:: -(-len(rows) // 16)]
    grid.set_yticks(shown, [str(layers[row].layer) for row in shown])
    scale = figure.colorbar(
        image, ax=[grid, bars], location="bottom", shrink=0.9, aspect=45, ticks=SCALE_TICKS
    )
    scale.ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    scale.ax.tick_params(labelsize=8)
    return figure


def ratio_panels(
    inspections: Sequence[Inspection],
) -> list[tuple[int, list[tuple[Line, str, str]]]]:
    """Mask ratio by position, a panel for each layer number.

    For each model its line, the path of a band from the 10th to the 90th percentile of the heads, and that
    of their median.
    """
    longest = max(len(one.tokens) for one in inspections)
    by_layer: dict[int, list[tuple[Line, str, str]]] = {}
    for one, line in zip(inspections, lines([one.attention for one in inspections])):
        for layer in one.layers:
            curves = np.quantile(layer.pseudo.numpy(), (0.1, 0.5, 0.9), axis=0)
            low, median, high = (_points(curve, longest) for curve in curves)
            band, middle = (f"M{' L'.join(points)}" for points in (high + low[::-1], median))
            by_layer.setdefault(layer.layer, []).append((line, band, middle))
    return sorted(by_layer.items())


def _points(shares: np.ndarray, longest: int) -> list[str]:
    """Corners of a curve, means over so many positions that a panel can show them apart."""
    step = -(-longest // PANEL_WIDTH)
    starts = np.arange(0, len(shares), step)
    counts = np.diff(np.append(starts, len(shares)))
    means = np.add.reduceat(shares.astype(float), starts) / counts
    x = (starts + (counts - 1) / 2) * PANEL_WIDTH / (longest - 1)
    return [f"{a:.1f} {b:.1f}" for a, b in zip(x, PANEL_HEIGHT * (1 - means))]


def head_map(real: np.ndarray, pseudo: np.ndarray, with_pseudo: bool) -> str:
    """A ``data:`` URI of a PNG: a map in shades, (s, s), and the mask ratio as columns beside it."""
    if with_pseudo:
        width = max(2, len(real) // 16)
        gap = np.full((len(real), max(1, width // 2)), SHADES, dtype=np.uint8)
        real = np.hstack((real, gap, np.repeat(pseudo[:, None], width, axis=1)))
    image = Image.fromarray(real)
    image.putpalette(_PALETTE)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _palette() -> bytes:
    colors = np.vstack((MAP_COLORS(np.linspace(0, 1, SHADES)), MAP_COLORS.get_bad()))
    return (255 * colors[:, :3]).round().astype(np.uint8).tobytes()


_PALETTE = _palette()
