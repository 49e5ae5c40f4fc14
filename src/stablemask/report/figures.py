"""The figures of a comparison, each a function from its data to drawings with their titles."""

from collections.abc import Iterable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..evaluation.perplexity import perplexity_text
from ..evaluation.sinks import even_first_token
from .comparison import Comparison, RunMeasurement
from .drawing import (
    GRAY,
    MAP_COLORS,
    MAP_NORM,
    STYLE,
    WIDTH,
    Line,
    chart,
    lines,
    svg_uri,
    visible_token,
)

Drawings = list[tuple[str, Figure]]
# Of a bar of perplexity; beyond, it would flatten the others, and its label says enough.
LONGEST_BAR = 1e6
HATCHES = {"-": "", "--": "//", ":": "..", "-.": "xx"}  # of bars, where others are lines


def draw_all(comparison: Comparison) -> dict[str, list[tuple[str, str]]]:
    """The drawings of every figure by its name: a title, and a ``data:`` URI of an SVG."""
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
        return {
            name: [(title, svg_uri(figure)) for title, figure in function(comparison)]
            for name, function in draw.items()
        }


def loss_curves(comparison: Comparison) -> Drawings:
    """Training and validation loss, and how far each run's validation loss is from the baseline's."""
    whole, both = chart("optimizer step", "loss (nats per token)")
    difference, gaps = chart("optimizer step", "difference (nats per token)")
    validation = {
        label: {point["step"]: point["loss"] for point in run.validation}
        for label, run in comparison.runs.items()
    }
    base = validation[comparison.baseline]
    for label, run, line in _lines(comparison):
        style = _marked(line)
        steps = [point["step"] for point in run.training]
        losses = [point["loss"] for point in run.training]
        both.plot(steps, losses, color=line.color, ls=line.ls, alpha=0.45, lw=1.2)
        both.plot(*_points(validation[label]), **style)
        gap = {step: loss - base[step] for step, loss in validation[label].items() if step in base}
        gaps.plot(*_points(gap), **style)
    return [
        ("Loss: validation (marked) and training (pale)", whole),
        (f"Validation loss minus {comparison.baseline}'s", difference),
    ]


def perplexity_by_length(comparison: Comparison) -> Drawings:
    runs = len(comparison.runs)
    rows = comparison.runs[comparison.baseline].perplexity
    figure, axes = chart("validation perplexity", height=1 + 0.3 * len(rows) * (runs + 0.6))
    thickness = 0.8 / runs
    for number, (_, run, line) in enumerate(_lines(comparison)):
        values = [row["perplexity"] for row in run.perplexity]
        bars = axes.barh(
            np.arange(len(values)) + (number - (runs - 1) / 2) * thickness,
            [value if value and value < LONGEST_BAR else 0.0 for value in values],
            0.92 * thickness,
            color=line.color, hatch=HATCHES[line.ls],
            edgecolor="white", linewidth=0,
        )  # fmt: skip
        texts = [perplexity_text(value, 1) if value else "not scored" for value in values]
        axes.bar_label(bars, texts, padding=2, fontsize=9)
    names = [f"{row['length']:,} tokens\n({row['multiple']}x)" for row in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.15)
    return [("By length of the text, in training lengths", figure)]


def attention_map(comparison: Comparison) -> Drawings:
    """One head of each run on the snippet, with its tokens, and the mask ratio as a last column."""
    labels = [visible_token(text) for text in comparison.snippet]
    ticks: dict[str, Any] = {"labels": labels, "fontsize": 7.5, "family": "monospace"}
    drawings = []
    for label, run in comparison.runs.items():
        figure = Figure((WIDTH, WIDTH), layout="constrained")
        axes = figure.subplots()
        strip = _draw_map(axes, run, comparison.head)
        axes.set_xticks(range(len(labels)), rotation=90, **ticks)
        axes.set_yticks(range(len(labels)), **ticks)
        axes.set(xlabel="token attended to", ylabel="token that attends")
        strip.set_xticks([0], ["pseudo"], rotation=90, fontsize=7.5)
        drawings.append((label, figure))
    return drawings


def attention_of_heads(comparison: Comparison) -> Drawings:
    """All heads of the layer of each run, on the same colour scale."""
    drawings = []
    for label, run in comparison.runs.items():
        heads = len(run.map_real)
        columns = min(heads, 4)
        rows = -(-heads // columns)
        figure = Figure((WIDTH, rows * (0.25 + 0.92 * WIDTH / columns)), layout="constrained")
        for head, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
            axes.set_visible(head < heads)
            if head < heads:
                _draw_map(axes, run, head).set_xticks([])
                axes.set(xticks=[], yticks=[])
                axes.set_title(f"head {head}", fontsize=9)
        drawings.append((label, figure))
    return drawings


def mask_ratio(comparison: Comparison) -> Drawings:
    """What the pseudo mass receives by position: a drawing a layer, a line a head, the first palest."""
    drawings = []
    for layer in range(len(comparison.runs[comparison.baseline].mask_ratio)):
        figure, axes = chart("position (tokens from the start)", "mask ratio", height=2.4)
        for _, run, line in _lines(comparison):
            heads = run.mask_ratio[layer]
            for head, ratio in enumerate(heads):
                color = (
                    _shade(line.color, head / max(1, len(heads) - 1)) if any(ratio) else line.color
                )
                axes.plot(*_smooth(ratio), color=color, ls=line.ls, lw=1.2)
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        drawings.append((f"layer {layer}", figure))
    return drawings


def attention_by_layer(comparison: Comparison) -> Drawings:
    titles = {
        "first_token": "First token: share of all attention",
        "first_token_of_real": "First token: share of what real tokens receive",
        "real_share": "Real tokens together: share of all attention",
    }
    even = even_first_token(comparison.context)
    highest = max(even, *(max(run.first_token_of_real) for run in comparison.runs.values()))
    drawings = []
    for name, title in titles.items():
        figure, axes = chart("layer", height=2.6)
        for _, run, line in _lines(comparison):
            axes.plot(getattr(run, name), **_marked(line))
        if name == "real_share":
            axes.set_ylim(0, 1.05)
        else:
            axes.axhline(even, color=GRAY, ls=":", lw=1.4)
            axes.set_ylim(0, 1.1 * highest)
        axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        drawings.append((title, figure))
    return drawings


def identical_tokens(comparison: Comparison) -> Drawings:
    """How far the output moves with the position, where all tokens are the same."""
    axis = "position (tokens from the start)", "largest difference of a feature"
    (plain, linear), (log, logarithmic) = chart(*axis), chart(*axis)
    for _, run, line in _lines(comparison):
        distance = np.array(run.identical_distance)
        linear.plot(distance, color=line.color, ls=line.ls)
        logarithmic.plot(np.where(distance > 0, distance, np.nan), color=line.color, ls=line.ls)
    logarithmic.set_yscale("log")
    return [
        ("Distance from the output at position 0", plain),
        ("The same on a logarithmic scale (zeros left out)", log),
    ]


def _lines(comparison: Comparison) -> Iterable[tuple[str, RunMeasurement, Line]]:
    runs = comparison.runs
    return zip(runs, runs.values(), lines([run.attention for run in runs.values()]))


def _marked(line: Line) -> dict[str, Any]:
    return {"color": line.color, "marker": line.marker, "ls": line.ls}


def _shade(color: str, weight: float) -> Any:
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


def _draw_map(axes: Axes, run: RunMeasurement, head: int) -> Axes:
    """The real tokens' shares, and at their right those of the pseudo mass in a strip, which is returned."""
    real = np.array(run.map_real[head])
    future = np.triu(np.ones_like(real, dtype=bool), k=1)
    look: dict[str, Any] = {"cmap": MAP_COLORS, "norm": MAP_NORM, "interpolation": "nearest"}
    axes.imshow(np.ma.masked_array(real, future), **look)
    strip = axes.inset_axes((1.03, 0, 0.045, 1))
    strip.imshow(np.array(run.map_pseudo[head])[:, None], aspect="auto", **look)
    strip.set_yticks([])
    for drawn in (axes, strip):
        drawn.grid(visible=False)
    return strip
