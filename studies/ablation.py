"""What the mass should be, and its rivals: the paper's Table 3 at our sizes."""

from __future__ import annotations

from typing import Any

from benchmarks.tables import table
from stablemask.evaluation.statistics import Estimate

from .language import context_of
from .language_section import SAME, by_seed, difference
from .study import SOURCE, Claim, Job, Record, Section
from .sweep import Size, finals, labels_of, losses_cells, rates_table, sizes_of
from .sweep import jobs as sweep_jobs

SIZES = {
    "small": (
        Size("nano", 2000, 2000, (1.5e-3, 3e-3, 6e-3), 1024, 60),
        Size("micro", 1000, 1000, (1e-3, 2e-3, 4e-3), 1024, 120),
    ),
    "gpu": (),
}
# The log of a constant pseudo score far from the range of the scores; the paper names no number.
FAR = -10.0
# The paper's perplexities on MiniPile, by our label of the row.
PAPER = {
    "softmax": 22.5,
    "learned-token": 21.6,
    "fixed-token": 22.4,
    "stablemask-paper": 21.1,
    "stablemask-zero": 21.5,
    "constant": 22.2,
}
WORDS = {
    "softmax": "softmax: all minus infinity",
    "learned-token": "a trained token in front",
    "fixed-token": "a fixed token in front",
    "stablemask-paper": "decaying: `stablemask-paper`",
    "stablemask-zero": "all zero: `stablemask-zero`",
    "constant": f"all {FAR:g}, far from the scores",
    "stablemask": "ours: `stablemask`",
    "softmax1": "softmax-off-by-one",
    "learned-sink": "a trained sink logit a head",
    "key-sink": "a trained key without a value",
    "head-gate": "a gate a head behind the attention",
}


def rows(context: int) -> dict[str, dict[str, Any]]:
    """Options of the attention, by label."""
    constant = {"attention": "stablemask", "gamma": 0.0, "horizon": context, "shift": FAR}
    return {label: constant if label == "constant" else {"attention": label} for label in WORDS}


def jobs(scale: str, seeds: int) -> list[Job]:
    return [
        job
        for size in SIZES[scale]
        for job in sweep_jobs(
            [size], rows(context_of(size.preset)), seeds, source=SOURCE, position="rope"
        )
    ]


def section(records: list[Record]) -> Section:
    sizes = sizes_of(finals(records))
    cells = [
        [
            WORDS[label],
            *(cell for preset in sizes for cell in losses_cells(records, preset, label)),
            f"{PAPER[label]}" if label in PAPER else "",
        ]
        for label in labels_of(finals(records))
    ]
    head = [
        "pseudo scores",
        *(f"{preset}, {what}" for preset in sizes for what in ("rate", "perplexity", "less softmax's")),
        "the paper's, MiniPile",
    ]  # fmt: skip
    shares = {preset: _share_of_zero(records, preset) for preset in sizes}
    return Section(
        [
            _claim("Decaying pseudo scores are better than zero ones", records, "stablemask-paper", "stablemask-zero"),
            _claim("Decaying pseudo scores are better than one trained token in front", records, "stablemask-paper", "learned-token"),
            _claim("Our default is better than the form as published", records, "stablemask", "stablemask-paper"),
        ],
        {"rows": table(head, cells), "rates": rates_table(records)},
        facts={
            "far": f"{FAR:g}",
            "paper_share": f"{(PAPER['softmax'] - PAPER['stablemask-zero']) / (PAPER['softmax'] - PAPER['stablemask-paper']):.0%}",
            "shares": {preset: f"{share:.0%}" for preset, share in shares.items() if share is not None},
            "ahead": {preset: rows for preset in sizes if (rows := _ahead(records, preset))},
            "same": SAME,
            "steps": {r["preset"]: f"{r['steps']:,}" for r in finals(records)},
        },
    )  # fmt: skip


def _claim(statement: str, records: list[Record], ours: str, theirs: str) -> Claim:
    """In each size."""
    found = [_difference(records, preset, ours, theirs) for preset in sizes_of(finals(records))]
    return Claim(
        f"{statement} (the paper's Table 3)" if ours != "stablemask" else statement,
        [less.below(0, SAME) for less in found if less is not None],
    )


def _difference(records: list[Record], preset: str, ours: str, theirs: str) -> Estimate | None:
    """In mean losses of one size, seed by seed."""
    of_size = [record for record in finals(records) if record["preset"] == preset]
    return difference(by_seed(of_size, label=ours), by_seed(of_size, label=theirs))


def _ahead(records: list[Record], preset: str) -> list[str]:
    """The rows that are better than softmax beyond doubt."""
    found = {label: _difference(records, preset, label, "softmax") for label in WORDS}
    return [WORDS[label] for label, less in found.items() if less is not None and less.below(0)]


def _share_of_zero(records: list[Record], preset: str) -> float | None:
    """How much of the gain of decaying scores zero ones have; None where there is no gain beyond doubt."""
    zero = _difference(records, preset, "stablemask-zero", "softmax")
    decaying = _difference(records, preset, "stablemask-paper", "softmax")
    if zero is None or decaying is None or not decaying.below(0):
        return None
    return zero.mean / decaying.mean
