"""The figures of an inspection, as ``data:`` URIs and inline SVG.

Shapes: L layers, H heads, n tokens.
"""

import base64
import io
from collections.abc import Iterator, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter
from PIL import Image

from .drawing import COLORS, GRAY, LINES, MAP_COLORS, MAP_NORM, STYLE, svg_uri
from .inspection import SHADES, Inspection

WIDTH = 5.0  # inches
SCALE_TICKS = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)
# Of a panel of the pseudo share, in its own units.
PANEL_WIDTH, PANEL_HEIGHT = 120, 60
DASHES = dict(zip(LINES, ("", "5 3", "1.5 2", "5 2 1.5 2")))


def layer_figures(inspections: Sequence[Inspection]) -> Iterator[tuple[str, str]]:
    """A title, and a chart of all models by layer: attention, what carries no value, outliers."""
    shares = {"Attention on the first token": lambda layer: layer.first_token.mean()}
    if any(one.pseudo for one in inspections):
        shares["Pseudo share"] = lambda layer: layer.pseudo.mean()
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
    styles = [_style(inspections, index) for index in range(len(inspections))]
    with matplotlib.rc_context(STYLE):
        for title, curves in charts.items():
            yield title, svg_uri(_layer_figure(curves, styles, as_share=title in shares))


def _layer_figure(
    curves: Sequence[tuple[Sequence[int], Sequence[float]]],
    styles: Sequence[tuple[str, str]],
    as_share: bool,
) -> Figure:
    figure = Figure((WIDTH, 2.6), layout="constrained")
    axes = figure.subplots()
    for (layers, numbers), (color, line) in zip(curves, styles, strict=True):
        axes.plot(layers, numbers, color=color, ls=line, marker="o", markersize=3)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    if as_share:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))
    else:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        axes.yaxis.set_minor_formatter(NullFormatter())
    return figure


def _plain(number: float, _: int | None = None) -> str:
    return f"{number:,.0f}" if number >= 1 else f"{number:.3g}"


def _style(inspections: Sequence[Inspection], index: int) -> tuple[str, str]:
    """Colour by kind of attention, and a line of its own where another of that kind came before."""
    kind = inspections[index].attention
    same = sum(other.attention == kind for other in inspections[:index])
    return COLORS[kind], LINES[same]


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


def ratio_panels(inspections: Sequence[Inspection]) -> Iterator[tuple[int, str]]:
    """Pseudo share by position, a panel for each layer number: median of the heads, 10 to 90 % pale."""
    longest = max(len(one.tokens) for one in inspections)
    by_layer: dict[int, list[str]] = {}
    for index, one in enumerate(inspections):
        color, line = _style(inspections, index)
        dash = DASHES[line]
        for layer in one.layers:
            curves = np.quantile(layer.pseudo.numpy(), (0.1, 0.5, 0.9), axis=0)
            low, median, high = (_points(curve, longest) for curve in curves)
            by_layer.setdefault(layer.layer, []).append(
                f'<path d="M{" L".join(high + low[::-1])} Z" fill="{color}" opacity=".18"/>'
                f'<path d="M{" L".join(median)}" fill="none" stroke="{color}" '
                f'stroke-width="1.8" stroke-dasharray="{dash}" vector-effect="non-scaling-stroke"/>'
            )
    lines = "".join(
        f'<path d="M0 {y} H{PANEL_WIDTH}" stroke="{GRAY}" stroke-width="1" opacity="{opacity}" '
        'vector-effect="non-scaling-stroke"/>'
        for y, opacity in ((0, 0.25), (PANEL_HEIGHT / 2, 0.25), (PANEL_HEIGHT, 0.7))
    )
    for number, drawn in sorted(by_layer.items()):
        yield (
            number,
            f'<svg viewBox="0 -1 {PANEL_WIDTH} {PANEL_HEIGHT + 2}" preserveAspectRatio="none" '
            f'role="img" aria-label="pseudo share of layer {number} by position">'
            f"{lines}{''.join(drawn)}</svg>",
        )


def _points(shares: np.ndarray, longest: int) -> list[str]:
    """Corners of a curve, means over so many positions that a panel can show them apart."""
    step = -(-longest // PANEL_WIDTH)
    starts = np.arange(0, len(shares), step)
    counts = np.diff(np.append(starts, len(shares)))
    means = np.add.reduceat(shares.astype(float), starts) / counts
    x = (starts + (counts - 1) / 2) * PANEL_WIDTH / (longest - 1)
    return [f"{a:.1f} {b:.1f}" for a, b in zip(x, PANEL_HEIGHT * (1 - means))]


def head_map(real: np.ndarray, pseudo: np.ndarray, with_pseudo: bool) -> str:
    """A ``data:`` URI of a PNG: a map in shades, (s, s), and the pseudo share as columns beside it."""
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


def shade(share: float) -> tuple[str, str]:
    """Background and ink of a share from 0 to 1, as CSS colours."""
    red, green, blue, _ = MAP_COLORS(float(MAP_NORM(share)))
    ink = "#111827" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "#fff"
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}", ink
