"""Is there any lead at the end of a longer training, or at its beginning alone?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.tables import table
from stablemask.data.sources import PACKAGES
from stablemask.evaluation.statistics import Estimate, estimate
from stablemask.report.drawing import GRAY

from .kinds import LABELS, kinds_legend, line_style
from .language_section import SAME, difference
from .scaling import FACTOR, PLAIN, SCALED, WINDOWED
from .study import Claim, Job, Record, Section
from .sweep import FINAL_TOKENS, Size, finals, labels_of, losses_cells, rates_table, sizes_of
from .sweep import jobs as sweep_jobs

KINDS = ("softmax", "stablemask", "stablemask-paper")
SIZES = {
    "small": (
        Size("nano", 20_000, 5_000, (1.5e-3, 3e-3, 6e-3), 1024, 60),
        Size("micro", 20_000, 5_000, (1e-3, 2e-3, 4e-3), 1024, 120),
    ),
    # In pieces: `timeout 350 python -m studies long --scale gpu --workers 1 --resume`.
    "gpu": (Size("paper-71m", 1000, 1000, (6e-4,), 32768, 120),),
}
WAYS = {
    PLAIN: "all keys kept",
    SCALED: "all keys kept, log-length scaling given to both",
    WINDOWED: "from a window",
}
SHOWN = 5  # steps of the table over training, evenly spread


def jobs(scale: str, seeds: int) -> list[Job]:
    rows = {kind: {"attention": kind} for kind in KINDS}
    return sweep_jobs(SIZES[scale], rows, seeds, source=PACKAGES, position="rope")


def section(records: list[Record]) -> Section:
    ends = finals(records)
    sizes = sizes_of(ends)
    rows = [
        [preset, LABELS[label], *losses_cells(records, preset, label)]
        for preset in sizes
        for label in labels_of(ends)
    ]
    head = ["size", "", "best rate", "perplexity at the end", "nats less softmax's"]
    return Section(
        [
            Claim(
                f"{LABELS[kind]} lowers the perplexity at the end of a longer training",
                _lower(ends, sizes, kind),
            )
            for kind in KINDS[1:]
        ]
        + [
            Claim(
                f"{LABELS[kind]} extrapolates better than softmax at the end of a longer training, {words}",
                [less.below(0, SAME) for less in far],
            )
            for way, words in WAYS.items()
            for kind in KINDS[1:]
            if (far := [less for size in sizes if (less := _further(ends, size, kind, way))])
        ],
        {
            "far": _far_table(ends, sizes),
            "ends": table(head, rows),
            "leads": _leads_table(ends, sizes),
            "rates": rates_table(records),
            "attention": _attention_table(ends, sizes),
        },
        {"lead": _lead_figure(ends, sizes), "layers": _layers_figure(ends, sizes)},
        {
            "factor": FACTOR,
            "final_tokens": f"{FINAL_TOKENS:,}",
            "packages": len(ends[0]["packages"]),
            "corpus": ends[0]["corpus"],
            "train_tokens": f"{ends[0]['train_tokens']:,}",
            "same": SAME,
            "steps": {record["preset"]: f"{record['steps']:,}" for record in ends},
        },
    )


def _lower(ends: Sequence[Record], sizes: Sequence[str], kind: str) -> list[bool | None]:
    """Loss below softmax's at the end, in each size."""
    leads = (_leads(ends, preset, kind) for preset in sizes)
    return [list(of.values())[-1].below(0, SAME) for of in leads if of]


def _leads(ends: Sequence[Record], preset: str, kind: str) -> dict[int, Estimate]:
    """Nats less softmax's by step, of the seeds that both have; at the last step of all that is scored."""
    curves: dict[str, dict[int, dict[int, float]]] = {kind: {}, "softmax": {}}
    for record in ends:
        if record["preset"] == preset and record["label"] in curves:
            points = dict([*record["curve"], (record["steps"], record["loss"])])
            for step, loss in points.items():
                curves[record["label"]].setdefault(step, {})[record["seed"]] = loss
    ours, theirs = curves[kind], curves["softmax"]
    found = {step: difference(ours[step], theirs[step]) for step in sorted(ours) if step in theirs}
    return {step: less for step, less in found.items() if less is not None}


def _leads_table(ends: Sequence[Record], sizes: Sequence[str]) -> str:
    rows: list[list[str]] = []
    head: list[str] = []
    for preset in sizes:
        for kind in KINDS[1:]:
            leads = _leads(ends, preset, kind)
            if not leads:
                continue
            every = max(1, len(leads) // SHOWN)
            shown = list(leads.items())[::-1][::every][:SHOWN][::-1]
            head = head or ["nats less softmax's", *(f"{step:,} steps" for step, _ in shown)]
            rows.append([f"{preset}, {LABELS[kind]}", *(less.text(3) for _, less in shown)])
    return table(head, rows) if rows else ""


def _attention_table(ends: Sequence[Record], sizes: Sequence[str]) -> str:
    """Of the layer with the most, at the end."""
    measures = (("first token", "first_token"), ("... of real attention", "first_token_real"),
                ("delimiters over even attention", "delimiters"), ("mask ratio", "mask_ratio"))  # fmt: skip
    rows = [
        [
            f"{preset}, {LABELS[label]}",
            *(
                estimate([max(record["attention"][name]) for record in of]).text(3)
                for _, name in measures
            ),
        ]
        for preset in sizes
        for label in labels_of(ends)
        if (of := [r for r in ends if (r["preset"], r["label"]) == (preset, label)])
    ]
    return table(["the layer with the most", *(title for title, _ in measures)], rows)


def _far(ends: Sequence[Record], preset: str, kind: str, way: str, part: int) -> dict[int, float]:
    """Nats of a seed, within the training length (part 0) or far past it (1)."""
    return {
        record["seed"]: record["far"][way][part]
        for record in ends
        if (record["preset"], record["label"]) == (preset, kind) and way in record["far"]
    }


def _further(ends: Sequence[Record], preset: str, kind: str, way: str) -> Estimate | None:
    """Nats far past the training length, less softmax's with as much scaling."""
    return difference(*(_far(ends, preset, label, way, 1) for label in (kind, "softmax")))


def _far_table(ends: Sequence[Record], sizes: Sequence[str]) -> str:
    rows = [
        [
            f"{preset}, {LABELS[kind]}",
            *(
                estimate([*found.values()]).text(3) if found else ""
                for way, part in ((PLAIN, 0), (PLAIN, 1), (SCALED, 1), (WINDOWED, 1))
                for found in [_far(ends, preset, kind, way, part)]
            ),
        ]
        for preset in sizes
        for kind in labels_of(ends)
    ]
    far = f"{FACTOR // 2}x to {FACTOR}x"
    return table(
        ["nats per token", "1x", f"{far}, all keys", f"{far}, log-length", f"{far}, a window"], rows
    )


def _lead_figure(ends: Sequence[Record], sizes: Sequence[str]) -> Figure:
    figure = Figure((4.8 * len(sizes), 3.8), layout="constrained")
    panels = figure.subplots(1, len(sizes), squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axes, preset in zip(panels, sizes, strict=True):
        axes.axhline(0, color=line_style("softmax")["color"], lw=1.4)
        for kind in KINDS[1:]:
            if leads := _leads(ends, preset, kind):
                means = [less.mean for less in leads.values()]
                (handles[kind],) = axes.plot(list(leads), means, **line_style(kind))
                axes.fill_between(
                    list(leads),
                    [less.low for less in leads.values()],
                    [less.high for less in leads.values()],
                    color=line_style(kind)["color"], alpha=0.15, lw=0,
                )  # fmt: skip
        axes.set_title(preset)
        axes.set_xlabel("training (steps); line: softmax")
    panels[0].set_ylabel("validation loss less softmax's\n(nats per token)")
    kinds_legend(figure, handles)
    return figure


def _layers_figure(ends: Sequence[Record], sizes: Sequence[str]) -> Figure:
    measures = (("first_token", "attention on the first token"),
                ("delimiters", "real attention on delimiters,\nover even attention"))  # fmt: skip
    figure = Figure((4.8 * len(sizes), 6.2), layout="constrained")
    panels = figure.subplots(len(measures), len(sizes), squeeze=False)
    handles: dict[str, Any] = {}
    for row, (name, label) in zip(panels, measures, strict=True):
        for axes, preset in zip(row, sizes, strict=True):
            for kind in labels_of(ends):
                of = [
                    r["attention"][name]
                    for r in ends
                    if (r["preset"], r["label"]) == (preset, kind)
                ]
                if of:
                    means = [sum(values) / len(values) for values in zip(*of, strict=True)]
                    (handles[kind],) = axes.plot(range(len(means)), means, **line_style(kind))
            if name == "delimiters":
                axes.axhline(1, color=GRAY, lw=1, ls=":")
            axes.set_title(preset)
            axes.set_xlabel("layer")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_ylim(bottom=0)
        row[0].set_ylabel(label)
    kinds_legend(figure, handles)
    return figure
