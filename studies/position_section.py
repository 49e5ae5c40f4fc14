"""Absolute positions: claims, tables and a figure, all from the records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.tables import records_table, table
from stablemask.evaluation.statistics import Estimate, estimate
from stablemask.report.drawing import GRAY

from .kinds import KINDS, LABELS, line_style
from .position import ENCODINGS, IDENTIFICATION, LAYERS, LEARNT, PARTS, REFERENCES, SHORTEST, WIDTH
from .position_results import MARGIN, SOLVED, Column, Results, ahead, at_chance, behind, solved
from .study import Claim, Record, Section
from .tables import joined, kinds_table
from .tasks import COPIED, LONGEST_RUN, SHORTEST_RUN, SYMBOLS, TASKS

USES = ("even", "parity", "copy")  # tasks that use the position
PAPERS = ("marked", "numbers")  # those of the paper beside identification
CONSTANT_MASSES = ("softmax1", "learned-sink")
SAME = 1e-3  # hidden states, which the last norm brings to about 1, that differ by rounding alone


def section(records: list[Record]) -> Section:
    results = Results(records)
    lengths = sorted({record["length"] for record in records})
    beyond = [
        result["twice"][1]
        for record in records
        for task, result in record["tasks"].items()
        if task in IDENTIFICATION and result["twice"]
    ]
    return Section(
        _claims(records, results),
        _tables(records, results, lengths),
        {"position": _figure(results, lengths[0])},
        {
            "beyond": _percent(max(beyond, default=0.0)),
            "copied": COPIED,
            "layers": LAYERS,
            "learnt": f"{LEARNT:.1%}".replace("%", " %"),
            "lengths": lengths,
            "longest_run": LONGEST_RUN,
            "margin": round(100 * MARGIN),
            "same": SAME,
            "shortest": SHORTEST,
            "shortest_run": SHORTEST_RUN,
            "solved": round(100 * SOLVED),
            "symbols": SYMBOLS,
            "width": WIDTH,
        },
    )


# Claims: each holds or does not in a cell, a relative encoding at a training length.


def _claims(records: Sequence[Record], results: Results) -> list[Claim]:
    def solves(task: str) -> list[bool | None]:
        ours = results.of_kind(task, "stablemask")
        gaps = results.differences(task, "stablemask", "softmax")
        return [solved(ours[column]) and ahead(gap) for column, gap in gaps.items()]

    constant = {kind: results.of_kind("constant", kind) for kind in KINDS}
    return [
        Claim(
            "With relative positions, softmax cannot tell where it is in a sequence of identical tokens.",
            [
                at_chance(accuracy, "constant", column[1])
                and max(map(max, _spreads(records, "softmax", column).values())) <= SAME
                for column, accuracy in constant["softmax"].items()
            ],
        ),
        Claim(
            "With StableMask it can, whatever the relative positions.",
            [solved(accuracy) for accuracy in constant["stablemask"].values()],
        ),
        *(
            [Claim("With StableMask as published it can.", list(map(solved, published.values())))]
            if (published := constant["stablemask-paper"])
            else []
        ),
        Claim(
            "It takes the decay of the mass: a pseudo mass of constant size does not tell the position.",
            [
                at_chance(accuracy, "constant", length)
                for kind in CONSTANT_MASSES
                for (_, length), accuracy in constant[kind].items()
            ],
        ),
        *(
            Claim(f"StableMask solves what softmax does not: {TASKS[task].title}.", solves(task))
            for task in ("random", *PAPERS, *USES)
            if results.lengths(task)
        ),
    ]


def _spreads(records: Sequence[Record], kind: str, column: Column) -> dict[str, list[float]]:
    """Of each seed, by what the model was trained on."""
    found: dict[str, list[float]] = {}
    for record in records:
        if (record["kind"], record["encoding"], record["length"]) == (kind, *column):
            for stage, spread in record["spread"].items():
                found.setdefault(stage, []).append(spread)
    return found


# Tables


def _tables(records: Sequence[Record], results: Results, lengths: Sequence[int]) -> dict[str, str]:
    tasks = [task for task in TASKS if results.lengths(task)]
    identification = [task for task in IDENTIFICATION if task in tasks]
    papers, uses = ([task for task in of if task in tasks] for of in (PAPERS, USES))
    tables = {
        "trainings": _trainings_table(records, lengths[0]),
        "spread": _spread_table(records, [(e, n) for n in lengths for e in ENCODINGS]),
        "identification": joined(_accuracy_table(results, task) for task in identification),
        "first_run": _first_run_table(results) if "runs" in tasks else "",
        "steps": joined(_steps_table(results, task) for task in identification if task != "runs"),
        "uses": joined(_accuracy_table(results, task) for task in uses),
        "references": _references_table(results, tasks),
        "halves": _halves_table(results, uses),
        "gaps": _gap_table(results, tasks),
    }
    if papers:  # of later jobs than the others
        tables["papers"] = joined(_accuracy_table(results, task) for task in papers)
    return tables


def _percent(share: float | Estimate) -> str:
    return share.text(1, 100) if isinstance(share, Estimate) else f"{100 * share:.1f}"


def _named(column: Column) -> str:
    return f"{column[0]} {column[1]}"


def _trainings_table(records: Sequence[Record], length: int) -> str:
    trainings = {
        task: {"task": TASKS[task].title, **training}
        for record in records
        if record["length"] == length
        for task, training in record["trainings"].items()
    }
    columns = (
        (f"at {length} tokens", "{task}"), ("steps at most", "{steps}"),
        ("sequences a step", "{batch}"), ("learning rate", "{learning_rate:g}"),
    )  # fmt: skip
    return records_table(trainings.values(), columns)


def _accuracy_table(results: Results, task: str) -> str:
    def cell(kind: str, column: Column) -> str:
        accuracy = results.accuracy(task, column[0], kind, column[1])
        if accuracy is None:
            return ""
        return f"**{_percent(accuracy)}**" if accuracy.mean >= SOLVED else _percent(accuracy)

    return kinds_table(TASKS[task].title, results.columns(task), cell, _named)


def _references_table(results: Results, tasks: Sequence[str]) -> str:
    """Chance, and what absolute positions reach under plain softmax."""

    def cell(task: str, encoding: str, length: int) -> str:
        accuracy = results.accuracy(task, encoding, "softmax", length)
        return "" if accuracy is None else _percent(accuracy)

    rows = [
        [
            f"{TASKS[task].title}, {length} tokens",
            _percent(TASKS[task].chance(length)),
            *(cell(task, encoding, length) for encoding in REFERENCES),
        ]
        for task in tasks
        for length in results.lengths(task)
    ]
    return table(["", "chance", *REFERENCES], rows)


def _spread_table(records: Sequence[Record], columns: Sequence[Column]) -> str:
    def cell(kind: str, column: Column) -> str:
        by_stage = _spreads(records, kind, column)
        return " / ".join(f"{max(spreads):.0e}" for spreads in by_stage.values())

    return kinds_table("", columns, cell, _named)


def _steps_table(results: Results, task: str) -> str:
    def cell(kind: str, column: Column) -> str:
        steps = [result["steps"] for result in results.of(task, column[0], kind, column[1])]
        return estimate(steps).text(0) if steps else ""

    return kinds_table(TASKS[task].title, results.columns(task), cell, _named)


def _halves_table(results: Results, tasks: Sequence[str]) -> str:
    """Accuracies on the halves of a sequence of twice the shortest training length."""
    columns = [(task, encoding) for task in tasks for encoding in (*ENCODINGS, "sinusoidal")]

    def cell(kind: str, column: tuple[str, str]) -> str:
        of_cell = results.of(*column, kind, results.lengths(column[0])[0])
        halves = zip(*(result["twice"] for result in of_cell), strict=True)
        return " / ".join(f"{100 * estimate(half).mean:.0f}" for half in halves)

    return kinds_table("", columns, cell, ", ".join)


def _gap_table(results: Results, tasks: Sequence[str]) -> str:
    others = ("stablemask-finite", *CONSTANT_MASSES)
    pairs = [("stablemask", "softmax"), *((kind, "stablemask") for kind in others)]
    head = ["", *(f"{LABELS[kind]} over {LABELS[other]}" for kind, other in pairs)]
    rows = [
        [TASKS[task].title, *(_gaps(results.differences(task, *pair)) for pair in pairs)]
        for task in tasks
    ]
    return table(head, rows)


def _gaps(gaps: dict[Column, Estimate]) -> str:
    """In how many cells one kind is ahead and behind, which one seed cannot tell, and the range."""
    if not gaps:
        return ""
    points = [100 * gap.mean for gap in gaps.values()]
    extent = f"{min(points):+.1f} to {max(points):+.1f}"
    in_front, at_back = ([rule(gap) for gap in gaps.values()] for rule in (ahead, behind))
    if None in in_front:
        return extent
    return f"ahead in {sum(map(bool, in_front))}, behind in {sum(map(bool, at_back))} of {len(gaps)} ({extent})"


def _first_run_table(results: Results) -> str:
    """How much is found of the first run of a symbol, before anything has changed."""
    length = results.lengths("runs")[0]
    parts = SHORTEST_RUN * PARTS // length

    def cell(kind: str, encoding: str) -> str:
        found = [
            sum(result["by_position"][:parts]) / parts
            for result in results.of("runs", encoding, kind, length)
        ]
        return _percent(estimate(found)) if found else ""

    return kinds_table("", ENCODINGS, cell)


# The figure


def _figure(results: Results, length: int) -> Figure:
    """Accuracy of identification by position."""
    figure = Figure((10, 8), layout="constrained")
    panels = figure.subplots(len(IDENTIFICATION), len(ENCODINGS), sharex=True, sharey=True)
    for row, (task, inputs) in zip(panels, IDENTIFICATION.items(), strict=True):
        for axes, encoding in zip(row, ENCODINGS, strict=True):
            _draw(axes, results, task, encoding, length)
            axes.set_title(f"{inputs}; {encoding}")
            if task == "runs":
                axes.axvline(SHORTEST_RUN, color=GRAY, lw=1, ls=":")
        row[0].set_ylabel("positions named right (%)")
    for axes in panels[-1]:
        axes.set_xlabel("position (tokens)")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def _draw(axes: Axes, results: Results, task: str, encoding: str, length: int) -> None:
    middles = [(part + 0.5) * length / PARTS for part in range(PARTS)]
    learned = {"color": GRAY, "lw": 5, "alpha": 0.35, "label": "softmax, learned positions"}
    lines: list[tuple[str, str, dict[str, Any]]] = [("learned", "softmax", learned)]
    lines += [(encoding, kind, {**line_style(kind), "label": LABELS[kind]}) for kind in KINDS]
    for of, kind, style in lines:
        if of_cell := results.of(task, of, kind, length):
            by_seed = zip(*(result["by_position"] for result in of_cell), strict=True)
            axes.plot(middles, [100 * estimate(part).mean for part in by_seed], **style)
    axes.set_ylim(-4, 104)
