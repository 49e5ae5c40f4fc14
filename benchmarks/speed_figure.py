"""Draws ``results/speed.png``, the figure of the README, from the result files beside it.

    python benchmarks/speed_figure.py

Forward + backward of heads of 64 over stock SDPA without a pseudo mass, by sequence length: ours on three
processors, and the paper's formula written out.
"""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

RESULTS = Path(__file__).parent / "results"
# Colours are Okabe and Ito's, which the colour-blind can tell apart; each line has a marker besides.
LINES = (
    # label, result file, row of it, colour, marker, line
    ("the paper's formula, dense", "attention-cpu-2026-11-23.json", "definition", "#d55e00", "D", "--"),
    ("Intel Xeon, AMX (stock kernel)", "intel-xeon/attention-cpu-2026-11-22.json", "stablemask", "#000000", "s", "-"),
    ("Intel Xeon, AVX-512 alone", "intel-xeon-avx512/attention-cpu-2026-11-28.json", "stablemask", "#009e73", "^", "-"),
    ("AMD EPYC, AVX-512 with bfloat16", "attention-cpu-2026-11-23.json", "stablemask", "#0072b2", "o", "-"),
)  # fmt: skip


def main() -> None:
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, panels = plt.subplots(1, 2, figsize=(9, 4.3), sharey=True, layout="constrained")
        for axes, dtype in zip(panels, ("float32", "bfloat16"), strict=True):
            draw(axes, dtype)
        panels[0].set_ylabel("time over stock SDPA")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        figure.suptitle("StableMask, forward + backward, two CPU cores; below 1 is faster")
        figure.savefig(RESULTS / "speed.png", dpi=130)


def draw(axes: Axes, dtype: str) -> None:
    axes.axhline(1, color="#6b7280", lw=1)
    for label, file, row, color, marker, line in LINES:
        lengths, ratios = ratios_by_length(RESULTS / file, row, dtype)
        axes.plot(lengths, ratios, color=color, marker=marker, ls=line, ms=5, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_yticks(ticks := (0.3, 0.5, 0.7, 1, 2, 3, 5), [f"{tick:g}x" for tick in ticks])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(title=dtype, xlabel="sequence length (tokens)", xticks=lengths, ylim=(0.27, 9))
    axes.grid(color="#e5e7eb")


def ratios_by_length(file: Path, row: str, dtype: str) -> tuple[list[int], list[float]]:
    records = [
        record
        for record in json.loads(file.read_text())["attention"]
        if (record["row"], record["dtype"], record["pass"]) == (row, dtype, "forward+backward")
        and (record["head_dim"], record["groups"]) == (64, 1)
    ]
    return [record["q_len"] for record in records], [record["ratio"] for record in records]


if __name__ == "__main__":
    main()
