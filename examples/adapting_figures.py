"""The figures of docs/results/adapting.md, from what `adapting.py measure` found; readable on a telephone."""

from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, PercentFormatter

from stablemask.evaluation.statistics import estimate
from stablemask.report import drawing

Measured = dict[str, Any]

WIDTH = 4.4  # inches; at 400 pixels a point is still more than one
STYLE = {**drawing.STYLE, "font.size": 9, "axes.titlesize": 10}
LINES = ("--", ":", "-", "-.")  # what is adapted comes last, and is drawn whole
COLORS = (drawing.COLORS["softmax"], drawing.GRAY, *list(drawing.COLORS.values())[1:])


def draw(results: dict[str, list[Measured]], teacher: str, out: Path) -> list[Path]:
    """Write the figures of several models; those of one label are seeds.

    Args:
        teacher: the label that perplexities are compared with.
    """
    with matplotlib.rc_context(STYLE):
        figures = {"layers": by_layer(results), "costs": costs(results, teacher)}
        paths = []
        for name, figure in figures.items():
            paths.append(out / f"adapting-{name}.png")
            figure.savefig(paths[-1], dpi=200)
    return paths


def by_layer(results: dict[str, list[Measured]]) -> Figure:
    """Attention on the first token, largest activation and kurtosis: of each layer the worst text."""
    figure = Figure((WIDTH, 7.4), layout="constrained")
    panels = figure.subplots(3, 1)
    names = ("first_token", "largest", "kurtosis")
    titles = ("Attention on the first token", "Largest activation", "Kurtosis (3: normal)")
    for axes, name, title in zip(panels, names, titles):
        for (label, seeds), color, line in zip(results.items(), COLORS, cycle(LINES)):
            worst = np.array(
                [np.max([text[name] for text in one["texts"].values()], axis=0) for one in seeds]
            )
            layers = np.arange(worst.shape[1])
            axes.plot(layers, worst.mean(axis=0), color=color, ls=line, label=label)
            if len(seeds) > 1:
                axes.fill_between(
                    layers, worst.min(axis=0), worst.max(axis=0), color=color, alpha=0.25, lw=0
                )
        axes.set_title(title)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
    panels[0].set_ylim(bottom=0)
    panels[0].legend(ncols=len(results), loc="lower left", bbox_to_anchor=(-0.02, 1.12))
    for axes in panels[1:]:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panels[2].set_xlabel("layer")
    return figure


def costs(results: dict[str, list[Measured]], teacher: str) -> Figure:
    """Bars: perplexity over the teacher's on each text, and what streaming, int8 and int4 cost."""
    reference = results[teacher][0]["texts"]

    def over(text: str) -> Callable[[Measured], float]:
        return lambda one: (
            100 * (one["texts"][text]["perplexity"] / reference[text]["perplexity"] - 1)
        )

    def cost(kind: str, key: str) -> Callable[[Measured], float]:
        return lambda one: one[kind][key]

    groups = {
        "Perplexity over the teacher's, %": ({text: over(text) for text in reference}, 1),
        "Streaming, nats lost": (
            {
                "nothing kept": cost("streaming", "window"),
                "StreamingLLM": cost("streaming", "StreamingLLM"),
            },
            2,
        ),
        "Int8 weights and activations, nats lost": (
            {"static": cost("int8", "static"), "dynamic": cost("int8", "dynamic")},
            3,
        ),
        "Int4 key-value cache, nats lost": (
            {"all of it": cost("int4_cache", "0"), "all but 4 tokens": cost("int4_cache", "4")},
            3,
        ),
    }
    heights = [len(bars) for bars, _ in groups.values()]
    figure = Figure((WIDTH, 0.24 * len(results) * sum(heights) + 3), layout="constrained")
    panels = figure.subplots(len(groups), 1, height_ratios=heights)
    for axes, (title, (bars, digits)) in zip(panels, groups.items()):
        shown = results
        if bars.keys() == reference.keys():  # where the teacher is 0 by definition
            shown = {label: seeds for label, seeds in results.items() if label != teacher}
        _bars(axes, shown, list(results), bars, digits)
        axes.set_title(title)
    handles, labels = panels[1].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=len(results), loc="outside upper left")
    return figure


def _bars(
    axes: Axes,
    results: dict[str, list[Measured]],
    order: Sequence[str],
    bars: dict[str, Callable[[Measured], float]],
    digits: int,
) -> None:
    """A group of bars for each name, in it one for each label, with its 95 % interval over seeds."""
    height = 0.8 / len(results)
    for row, (label, seeds) in enumerate(results.items()):
        found = [estimate([value(one) for one in seeds]) for value in bars.values()]
        places = [place + (row - (len(results) - 1) / 2) * height for place in range(len(bars))]
        drawn = axes.barh(
            places,
            [one.mean for one in found],
            0.9 * height,
            xerr=[np.nan_to_num(one.half_width) for one in found] if len(seeds) > 1 else None,
            error_kw={"elinewidth": 1, "capsize": 2},
            color=COLORS[order.index(label)],
            label=label,
        )
        texts = [f"{round(one.mean, digits) + 0.0:.{digits}f}" for one in found]
        axes.bar_label(drawn, texts, padding=3, fontsize=8)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.locator_params(axis="x", nbins=6)
    axes.axvline(0, color=drawing.GRAY, lw=0.8)
    axes.grid(axis="y", visible=False)
