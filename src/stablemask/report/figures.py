"""The figures of a comparison, each a function from its data to a Matplotlib figure."""

from itertools import count
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..evaluation.perplexity import perplexity_text
from ..evaluation.sinks import even_first_token
from .comparison import Comparison, RunMeasurement
from .drawing import (
    COLORS,
    GRAY,
    LINES,
    MAP_COLORS,
    MAP_NORM,
    MARKERS,
    STYLE,
    svg_uri,
    visible_token,
)

WIDTH = 9.6  # inches
TALLEST = (
    1e6  # of a bar of perplexity; beyond, it would flatten the others, and its label says enough
)


def draw_all(comparison: Comparison) -> dict[str, str]:
    """Every figure by name, as a ``data:`` URI of an SVG."""
    draw = {
        "loss": loss_curves,
        "perplexity": perplexity_by_length,
        "map": attention_map,
        "heads": attention_of_heads,
        "ratio": mask_ratio,
        "layers": attention_by_layer,
        "identical": identical_tokens,
    }
    with matplotlib.rc_context(STYLE):
        return {name: svg_uri(function(comparison)) for name, function in draw.items()}


def loss_curves(comparison: Comparison) -> Figure:
    """Training and validation loss, and how far each run's validation loss is from the baseline's."""
    figure = Figure((WIDTH, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    validation = {
        label: {point["step"]: point["loss"] for point in run.validation}
        for label, run in comparison.runs.items()
    }
    base = validation[comparison.baseline]
    for label, run, style in _styled(comparison):
        steps = [point["step"] for point in run.training]
        losses = [point["loss"] for point in run.training]
        left.plot(steps, losses, color=style["color"], ls=style["ls"], alpha=0.45, lw=1.2)
        left.plot(*_points(validation[label]), **style, label=label)
        gap = {step: loss - base[step] for step, loss in validation[label].items() if step in base}
        right.plot(*_points(gap), **style)
    left.set(title="Loss: validation (marked) and training", xlabel="optimizer step")
    left.set_ylabel("loss (nats per token)")
    left.legend()
    right.set(title=f"Validation loss minus {comparison.baseline}'s", xlabel="optimizer step")
    right.set_ylabel("difference (nats per token)")
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def perplexity_by_length(comparison: Comparison) -> Figure:
    figure = Figure((WIDTH, 3.5), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(comparison.runs)
    rows = next(iter(comparison.runs.values())).perplexity
    for number, (label, run, style) in enumerate(_styled(comparison)):
        offset = (number - (len(comparison.runs) - 1) / 2) * width
        values = [row["perplexity"] for row in run.perplexity]
        heights = [value if value and value < TALLEST else 0.0 for value in values]
        bars = axes.bar(
            np.arange(len(values)) + offset, heights, 0.92 * width,
            color=style["color"], label=label, hatch=("", "//", "..", "xx")[number % 4],
            edgecolor="white", linewidth=0,
        )  # fmt: skip
        texts = [perplexity_text(value, 1) if value else "not scored" for value in values]
        axes.bar_label(bars, texts, padding=2, fontsize=9)
    axes.set_xticks(
        range(len(rows)),
        [f"{row['length']:,} tokens\n{row['multiple']}x the training length" for row in rows],
    )
    axes.set_ylabel("validation perplexity")
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.25)
    axes.legend(loc="upper left", ncols=len(comparison.runs))
    return figure


def attention_map(comparison: Comparison) -> Figure:
    """One head of each run on the snippet, with its tokens, and the pseudo share as a last column."""
    runs = comparison.runs
    labels = [visible_token(text) for text in comparison.snippet]
    figure = Figure((WIDTH, 1 + 0.88 * WIDTH / len(runs)), layout="constrained")
    panels = figure.subplots(1, len(runs), sharey=True)
    for axes, (label, run) in zip(panels, runs.items()):
        image, strip = _draw_map(axes, run, comparison.head)
        axes.set_title(label)
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7.5, family="monospace")
        axes.set_xlabel("token attended to")
        strip.set_xticks([0], ["pseudo"], rotation=90, fontsize=7.5)
    panels[0].set_yticks(range(len(labels)), labels, fontsize=7.5, family="monospace")
    panels[0].set_ylabel("token that attends")
    bar = figure.colorbar(
        image,
        ax=panels,
        location="top",
        shrink=0.5,
        aspect=40,
        ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1],
    )
    bar.set_label("share of the row's attention (square-root scale)")
    return figure


def attention_of_heads(comparison: Comparison) -> Figure:
    """All heads of the layer, one row a run, on the same colour scale."""
    runs = comparison.runs
    heads = len(next(iter(runs.values())).map_real)
    columns = min(heads, 8)
    figure = Figure((WIDTH, len(runs) * (0.35 + 0.92 * WIDTH / columns)), layout="constrained")
    panels = figure.subplots(len(runs), columns, squeeze=False)
    for row, (label, run) in zip(panels, runs.items()):
        for head, axes in enumerate(row):
            _, strip = _draw_map(axes, run, head)
            axes.set(xticks=[], yticks=[])
            strip.set_xticks([])
            axes.set_title(f"head {head}", fontsize=9)
        row[0].set_ylabel(label)
    return figure


def mask_ratio(comparison: Comparison) -> Figure:
    """What the pseudo mass receives by position: a panel a layer, a line a head, the first palest."""
    layers = len(next(iter(comparison.runs.values())).mask_ratio)
    columns = min(layers, 3)
    figure = Figure((WIDTH, 0.5 + 2.2 * -(-layers // columns)), layout="constrained")
    panels = figure.subplots(
        -(-layers // columns), columns, sharex=True, sharey=True, squeeze=False
    )
    for layer, axes in enumerate(panels.flat):
        if layer >= layers:
            axes.set_visible(False)
            continue
        for label, run, style in _styled(comparison):
            heads = run.mask_ratio[layer]
            for head, ratio in enumerate(heads):
                shade: Any = style["color"]
                if any(ratio):
                    shade = _shade(shade, head / max(1, len(heads) - 1))
                name = label if layer == head == 0 else None
                axes.plot(*_smooth(ratio), color=shade, ls=style["ls"], lw=1.2, label=name)
        axes.set_title(f"layer {layer}")
        axes.set_ylim(-0.03, 1.03)
    figure.supxlabel("position (tokens from the start)", fontsize=10)
    figure.supylabel("mask ratio (share of a row)", fontsize=10)
    legend = figure.legend(loc="outside upper right", ncols=len(comparison.runs))
    for handle, run in zip(legend.get_lines(), comparison.runs.values()):
        handle.set(color=COLORS[run.attention], linewidth=2)
    return figure


def attention_by_layer(comparison: Comparison) -> Figure:
    figure = Figure((WIDTH, 3.6), layout="constrained")
    panels = figure.subplots(1, 3)
    first, of_real, share = panels
    of_real.sharey(first)
    for label, run, style in _styled(comparison):
        first.plot(run.first_token, **style, label=label)
        of_real.plot(run.first_token_of_real, **style)
        share.plot(run.real_share, **style)
    for axes in (first, of_real):
        axes.axhline(even_first_token(comparison.context), color=GRAY, ls=":", lw=1.4)
    first.set_ylim(bottom=0)
    share.set_ylim(0, 1.05)
    first.set(title="First token", ylabel="share of all attention")
    of_real.set(title="First token", ylabel="share of real attention")
    share.set(title="Real tokens together", ylabel="share of all attention")
    for axes in panels:
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
    figure.legend(loc="outside upper right", ncols=len(comparison.runs))
    return figure


def identical_tokens(comparison: Comparison) -> Figure:
    """How far the output moves with the position, where all tokens are the same."""
    figure = Figure((WIDTH, 3.4), layout="constrained")
    linear, logarithmic = figure.subplots(1, 2)
    for label, run, style in _styled(comparison):
        distance = np.array(run.identical_distance)
        line = {"color": style["color"], "ls": style["ls"]}
        linear.plot(distance, **line, label=label)
        logarithmic.plot(np.where(distance > 0, distance, np.nan), **line)
    logarithmic.set_yscale("log")
    linear.set_title("Distance from the output at position 0")
    logarithmic.set_title("The same on a logarithmic scale (zeros left out)")
    for axes in (linear, logarithmic):
        axes.set_xlabel("position (tokens from the start)")
        axes.set_ylabel("largest difference of a feature")
    linear.legend()
    return figure


def _styled(comparison: Comparison) -> list[tuple[str, RunMeasurement, dict[str, str]]]:
    """Each run with the keywords of its lines."""
    seen: dict[str, count] = {}
    styled = []
    for label, run in comparison.runs.items():
        kind = run.attention
        line = LINES[next(seen.setdefault(kind, count())) % len(LINES)]
        styled.append((label, run, {"color": COLORS[kind], "marker": MARKERS[kind], "ls": line}))
    return styled


def _shade(color: str, weight: float) -> tuple[float, ...]:
    """From a pale tint of the colour at 0 to a dark shade of it at 1."""
    rgb = np.array(to_rgb(color))
    return tuple((1 - weight) * (0.45 * rgb + 0.55) + weight * 0.55 * rgb)


def _smooth(values: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Positions and a running mean over a 32nd of them."""
    window = max(1, len(values) // 32)
    mean = np.convolve(values, np.full(window, 1 / window), mode="valid")
    return np.arange(len(mean)) + (window - 1) / 2, mean


def _points(by_step: dict[float, float]) -> tuple[list[float], list[float]]:
    return list(by_step), list(by_step.values())


def _draw_map(axes: Axes, run: RunMeasurement, head: int) -> tuple[AxesImage, Axes]:
    """The real tokens' shares, and those of the pseudo mass in a strip at their right."""
    real = np.array(run.map_real[head])
    future = np.triu(np.ones_like(real, dtype=bool), k=1)
    look: dict[str, Any] = {"cmap": MAP_COLORS, "norm": MAP_NORM, "interpolation": "nearest"}
    image = axes.imshow(np.ma.masked_array(real, future), **look)
    strip = axes.inset_axes((1.03, 0, 0.045, 1))
    strip.imshow(np.array(run.map_pseudo[head])[:, None], aspect="auto", **look)
    strip.set_yticks([])
    for drawn in (axes, strip):
        drawn.grid(visible=False)
    return image, strip
