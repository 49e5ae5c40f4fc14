"""Draws ``results/speed.png``, the figure of the README, from the result files beside it.

    python -m benchmarks.speed_figure

Forward + backward of heads of 64 over stock SDPA without a pseudo mass, by sequence length: ours on three
processors, and the paper's formula written out.
"""

import json
from pathlib import Path

import matplotlib

from stablemask.writing import whole_file

from .figure import STYLE, Line, Panels, draw

RESULTS = Path(__file__).parent / "results"
EPYC = "attention-cpu-2026-11-29.json"
# Each line, and the result file and the row that it is drawn of.
LINES = {
    Line("the paper's formula written out, AMD EPYC, Zen 5", "#d55e00", "D", "--"): (EPYC, "definition"),
    Line("Intel Xeon, AMX: ours, by the stock kernel", "#000000", "s", "-"): ("intel-xeon/attention-cpu-2026-11-22.json", "stablemask"),
    Line("Intel Xeon, AVX-512 alone: ours", "#009e73", "^", "-"): ("intel-xeon-avx512/attention-cpu-2026-11-28.json", "stablemask"),
    Line("AMD EPYC, Zen 5: ours", "#0072b2", "o", "-"): (EPYC, "stablemask"),
}  # fmt: skip


def main() -> None:
    records = [
        {**record, "row": line.label}
        for line, (file, row) in LINES.items()
        for record in json.loads((RESULTS / file).read_text())["attention"]
        if (record["row"], record["pass"]) == (row, "forward+backward")
        and (record["head_dim"], record["groups"]) == (64, 1)
    ]
    heading = "StableMask, forward + backward; each processor against its own stock SDPA; below 1 is faster"
    with matplotlib.rc_context({**STYLE, "font.size": 10}):
        figure = draw([Panels("time", records)], heading, {line.label: line for line in LINES})
        with whole_file(RESULTS / "speed.png") as partial:
            figure.savefig(partial, dpi=130)


if __name__ == "__main__":
    main()
