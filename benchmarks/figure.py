"""One figure of a run: ratios to stock SDPA by length, on logarithmic axes.

The colours are from Okabe and Ito's palette, which the colour-blind can tell apart; every line has a
marker of its own besides.
"""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from .measure import DECODE, TRAINING

# Colour, marker and line: ours drawn through, the definition dashed, what others wrote dotted.
STYLES = {
    "stablemask": ("#0072b2", "o", "-"),
    "learned sink": ("#009e73", "s", "-"),
    "definition": ("#d55e00", "D", "--"),
    "flex lse": ("#56b4e9", "^", ":"),
    "flex zero key": ("#56b4e9", "v", ":"),
    "softmax-n flash": ("#e69f00", "<", ":"),
    "softmax-n slow": ("#e69f00", ">", ":"),
    "x-transformers": ("#cc79a7", "P", ":"),
    "gpt-oss eager": ("#000000", "X", ":"),
}
LABELS = {
    "stablemask": "StableMask, this package",
    "learned sink": "learned sink, this package",
    "definition": "the paper's formula, dense",
    "flex lse": "FlexAttention, sink through its lse",
    "flex zero key": "FlexAttention, sink as a key",
    "softmax-n flash": "flash-attention-softmax-n",
    "softmax-n slow": "flash-attention-softmax-n, slow path",
    "x-transformers": "x-transformers, learned sink",
    "gpt-oss eager": "Transformers, gpt-oss eager",
}
PANELS = {
    TRAINING: ("forward and backward", "sequence length (tokens)"),
    DECODE: ("decode of one token, batch 1", "keys in the cache (tokens)"),
}
RATIO_TICKS = (
    0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7,
    1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100,
)  # fmt: skip
STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#6b7280",
    "axes.grid": True, "grid.color": "#e5e7eb",
}  # fmt: skip


def save_figure(result: dict[str, Any], path: Path) -> None:
    """Draw the first head_dim and group of a run; the format is the suffix of ``path``."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        draw(result).savefig(path, dpi=160)


def draw(result: dict[str, Any]) -> Figure:
    records = _shown(result)
    dtypes = list(dict.fromkeys(record["dtype"] for record in records))
    kinds = [kind for kind in PANELS if any(record["pass"] == kind for record in records)]
    figure = Figure((4.4 * len(dtypes), 3.1 * len(kinds) + 1.5), layout="constrained")
    panels = figure.subplots(len(kinds), len(dtypes), squeeze=False, sharey="row")
    handles: dict[str, Any] = {}
    for kind, line in zip(kinds, panels, strict=True):
        of_kind = [record for record in records if record["pass"] == kind]
        title, unit = PANELS[kind]
        for dtype, axes in zip(dtypes, line, strict=True):
            _draw_panel(axes, [r for r in of_kind if r["dtype"] == dtype], handles)
            axes.set(title=f"{title}, {dtype}", xlabel=unit)
        _scale_ratios(line[0], [record["ratio"] for record in of_kind])
    first = records[0]
    groups = f", {first['groups']} to a key head" if first["groups"] > 1 else ""
    figure.suptitle(
        "Attention with a sink against F.scaled_dot_product_attention without one\n"
        f"{result['hardware']}; PyTorch {result['versions']['torch']}; heads of "
        f"{first['head_dim']}{groups}",
        fontsize=9.5,
    )
    order = [name for name in STYLES if name in handles]
    figure.legend(
        [handles[name] for name in order], [LABELS[name] for name in order],
        loc="outside lower center", ncols=2, frameon=False,
    )  # fmt: skip
    return figure


def _shown(result: dict[str, Any]) -> list[dict[str, Any]]:
    records = [
        record
        for record in (*result.get("attention", ()), *result.get("decode", ()))
        if record["row"] in STYLES and record["ratio"] is not None and record["pass"] in PANELS
    ]
    if not records:
        return records
    shape = records[0]["head_dim"], records[0]["groups"]
    return [
        record
        for record in records
        if (record["head_dim"], record["groups"]) == shape
        and (record["pass"] != DECODE or record["batch"] == 1)
    ]


def _draw_panel(axes: Axes, records: list[dict[str, Any]], handles: dict[str, Any]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.axhline(1, color="#6b7280", lw=1)
    for name, (color, marker, line) in STYLES.items():
        points = sorted((r["kv_len"], r["ratio"]) for r in records if r["row"] == name)
        if points:
            (handles[name],) = axes.plot(
                *zip(*points, strict=True), color=color, marker=marker, ls=line, lw=1.6, ms=5,
                zorder=3 if line == "-" else 2,
            )  # fmt: skip
    axes.set_xticks(sorted({record["kv_len"] for record in records}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())


def _scale_ratios(axes: Axes, ratios: list[float]) -> None:
    low, high = min(0.9, 0.9 * min(ratios)), max(1.3, 1.2 * max(ratios))
    ticks = [tick for tick in RATIO_TICKS if low <= tick <= high]
    axes.set_ylim(low, high)
    axes.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("time / time of stock SDPA")
