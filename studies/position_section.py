"""What the page says of absolute positions: tables, a figure and verdicts, all from the records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stablemask.evaluation.statistics import Estimate, estimate
from stablemask.report.drawing import GRAY

from .kinds import KINDS, LABELS, line_style
from .page import table
from .position_results import (
    ENCODINGS,
    MARGIN,
    REFERENCES,
    SOLVED,
    Column,
    Results,
    ahead,
    at_chance,
    behind,
    solved,
)
from .study import Claim, Record, Section, verdict
from .tasks import COPIED, LONGEST_RUN, SHORTEST_RUN, SYMBOLS, TASKS

PARTS = 16  # of a sequence, whose accuracies are recorded apart
IDENTIFICATION = {
    "constant": "one token repeated",
    "runs": "two symbols in long runs",
    "random": "random tokens",
}
USES = ("even", "parity", "copy")  # tasks that use the position
CONSTANT_MASSES = ("softmax1", "learned-sink")
SAME = 1e-3  # hidden states, which the last norm brings to about 1, that differ by rounding alone

T = TypeVar("T")


def section(records: list[Record]) -> Section:
    results = Results(records)
    figures = {"position": _figure(results, min(record["length"] for record in records))}
    return Section(_claims(records, results), _body(records, results), figures)


# Claims: each holds or does not in a cell, a relative encoding at a training length.


def _claims(records: Sequence[Record], results: Results) -> list[Claim]:
    return [
        _softmax_is_blind(records, results),
        _stablemask_sees(results),
        _decay_is_needed(results),
        *(_stablemask_solves(results, task) for task in ("random", *USES)),
    ]


def _softmax_is_blind(records: Sequence[Record], results: Results) -> Claim:
    found = results.of_kind("constant", "softmax")
    spreads = {column: max(_spreads(records, "softmax", column)) for column in found}
    holds = [
        at_chance(accuracy, "constant", column[1]) and spreads[column] <= SAME
        for column, accuracy in found.items()
    ]
    chances = [_percent(TASKS["constant"].chance(n)) for n in results.lengths("constant")]
    most = max((accuracy.mean for accuracy in found.values()), default=0.0)
    return Claim(
        "With relative positions, softmax cannot tell where it is in a sequence of identical tokens.",
        f"it finds at most {_percent(most)} % of the positions (chance {_listed(chances)} %); its final hidden "
        f"states are at most {max(spreads.values(), default=0.0):.0e} apart, before training and after",
        verdict(holds),
    )


def _stablemask_sees(results: Results) -> Claim:
    found = results.of_kind("constant", "stablemask")
    return Claim(
        "With StableMask it can, whatever the relative positions.",
        "positions found: " + _enumerated(found),
        verdict([solved(accuracy) for accuracy in found.values()]),
    )


def _decay_is_needed(results: Results) -> Claim:
    holds, measured = [], []
    for kind in CONSTANT_MASSES:
        found = results.of_kind("constant", kind)
        holds += [at_chance(value, "constant", length) for (_, length), value in found.items()]
        measured.append(f"{LABELS[kind]}: {_enumerated(found)}")
    return Claim(
        "It takes the decay of the mass: a pseudo mass of constant size does not tell the position.",
        "positions of identical tokens found with " + "; ".join(measured),
        verdict(holds),
    )


def _stablemask_solves(results: Results, task: str) -> Claim:
    ours, theirs = (results.of_kind(task, kind) for kind in ("stablemask", "softmax"))
    gaps = results.differences(task, "stablemask", "softmax")
    measured = [
        f"{_named(column)} {_percent(ours[column])} against {_percent(theirs[column])}"
        for column in gaps
    ]
    return Claim(
        f"StableMask solves what softmax does not: {TASKS[task].title}.",
        "accuracy in %, StableMask against softmax: " + "; ".join(measured),
        verdict([solved(ours[column]) and ahead(gap) for column, gap in gaps.items()]),
    )


def _spreads(records: Sequence[Record], kind: str, column: Column) -> list[float]:
    """Of all seeds and trainings."""
    return [
        spread
        for record in records
        if (record["kind"], record["encoding"], record["length"]) == (kind, *column)
        for spread in record["spread"].values()
    ]


# Words and tables


def _percent(share: float | Estimate) -> str:
    return share.text(1, 100) if isinstance(share, Estimate) else f"{100 * share:.1f}"


def _named(column: Column) -> str:
    return f"{column[0]} {column[1]}"


def _enumerated(found: dict[Column, Estimate]) -> str:
    return ", ".join(f"{_named(column)} {_percent(value)} %" for column, value in found.items())


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def _kinds_table(
    columns: Sequence[T], name: Callable[[T], str], cell: Callable[[str, T], str]
) -> str:
    """A row for each kind that has a cell."""
    rows = [[LABELS[kind], *(cell(kind, column) for column in columns)] for kind in KINDS]
    return table(["", *map(name, columns)], [row for row in rows if any(row[1:])])


def _accuracy_table(results: Results, task: str) -> str:
    def cell(kind: str, column: Column) -> str:
        accuracy = results.accuracy(task, column[0], kind, column[1])
        if accuracy is None:
            return ""
        return f"**{_percent(accuracy)}**" if accuracy.mean >= SOLVED else _percent(accuracy)

    references = []
    for length in results.lengths(task):
        words = [f"length {length}: chance {_percent(TASKS[task].chance(length))} %"]
        for encoding in REFERENCES:
            accuracy = results.accuracy(task, encoding, "softmax", length)
            if accuracy is not None:
                words.append(f"{encoding} {_percent(accuracy)} %")
        references.append(", ".join(words))
    title = TASKS[task].title
    return "\n\n".join(
        (
            f"**{title[0].upper()}{title[1:]}**, accuracy in %:",
            _kinds_table(results.columns(task), _named, cell),
            f"Softmax with absolute positions, {'; '.join(references)}.",
        )
    )


def _spread_table(records: Sequence[Record]) -> str:
    lengths = sorted({record["length"] for record in records})

    def cell(kind: str, column: Column) -> str:
        of_cell = [
            record["spread"]
            for record in records
            if (record["kind"], record["encoding"], record["length"]) == (kind, *column)
        ]
        stages = of_cell[0] if of_cell else ()
        return " / ".join(f"{max(spread[stage] for spread in of_cell):.0e}" for stage in stages)

    return _kinds_table([(e, n) for n in lengths for e in ENCODINGS], _named, cell)


def _steps_table(results: Results, task: str) -> str:
    def cell(kind: str, column: Column) -> str:
        steps = [result["steps"] for result in results.of(task, column[0], kind, column[1])]
        return estimate(steps).text(0) if steps else ""

    return _kinds_table(results.columns(task), _named, cell)


def _halves_table(results: Results, tasks: Sequence[str]) -> str:
    """Accuracies on the halves of a sequence of twice the shortest training length."""
    columns = [(task, encoding) for task in tasks for encoding in (*ENCODINGS, "sinusoidal")]

    def cell(kind: str, column: tuple[str, str]) -> str:
        of_cell = results.of(*column, kind, results.lengths(column[0])[0])
        halves = zip(*(result["twice"] for result in of_cell), strict=True)
        return " / ".join(f"{100 * estimate(half).mean:.0f}" for half in halves)

    return _kinds_table(columns, ", ".join, cell)


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


def _constant_masses(results: Results) -> str:
    """In how many cells a pseudo mass of constant size tells positions of identical tokens."""
    found = []
    for kind in CONSTANT_MASSES:
        accuracies = results.of_kind("constant", kind)
        chances = [TASKS["constant"].chance(length) for _, length in accuracies]
        above = [a.mean > chance + MARGIN for a, chance in zip(accuracies.values(), chances)]
        found.append(f"{LABELS[kind]} is above chance in {sum(above)} of {len(above)} cells")
    return ", ".join(found)


def _first_run(results: Results) -> str:
    """How much is found of the first run of a symbol, before anything has changed."""
    (length,) = results.lengths("runs")
    parts = SHORTEST_RUN * PARTS // length
    extremes = []
    for kind, name, extreme in (("softmax", "at most", max), ("stablemask", "at least", min)):
        shares = [
            sum(result["by_position"][:parts]) / parts
            for encoding in ENCODINGS
            for result in results.of("runs", encoding, kind, length)
        ]
        if shares:
            extremes.append(f"{name} {_percent(extreme(shares))} % with {LABELS[kind]}")
    return _listed(extremes)


def _body(records: Sequence[Record], results: Results) -> str:
    lengths = sorted({record["length"] for record in records})
    seeds = len({record["seed"] for record in records})
    steps = {
        f"{task} {training['steps']} of {training['batch']} ({training['learning_rate']:g})": None
        for record in records
        if record["length"] == lengths[0]
        for task, training in record["trainings"].items()
    }
    tasks = [task for task in TASKS if results.lengths(task)]
    beyond = [
        result["twice"][1]
        for record in records
        for task, result in record["tasks"].items()
        if TASKS[task].indices and result["twice"]
    ]
    return "\n\n".join(
        (
            f"Decoders of 3 layers, width 64 and 4 heads, trained from scratch on each task and tested on fresh "
            f"sequences; {seeds} seed{'s' * (seeds > 1)}, training lengths {_listed([str(length) for length in lengths])}. All "
            "encodings and kinds have the same steps, batches and learning rate, at length "
            f"{lengths[0]}: {', '.join(steps)}; a training ends sooner where a fixed check reaches 99.9 %. For "
            "copying and even-token prediction the sequences grow to the training length, from 8 tokens. A task is "
            f"solved (bold) from {100 * SOLVED:.0f} % on, and at chance up to {100 * MARGIN:.0f} points above it; "
            f"ahead is where the whole interval of the difference is more than {100 * MARGIN:.0f} points. A claim "
            "that holds at every relative encoding and length is reproduced; at some, partly.",
            "**Identical tokens.** With relative positions every row of plain softmax averages equal values: the "
            "same output at every position, in every layer. A row with a sink logit c leaves its tokens the share "
            "Z / (Z + exp c), and Z, a sum over the i + 1 tokens it sees, grows with i. So it is the pseudo mass that breaks "
            f"the symmetry, also one of constant size, and not the decay alone: {_constant_masses(results)}. What the decay "
            "adds to that, tables below tell. Largest deviation of final hidden states from those of the first token, "
            "over seeds: untrained / trained on one token repeated / trained on random tokens.",
            _spread_table(records),
            "**Position identification**: name the index of each token, from inputs that tell more and more of it. "
            f"In runs of {SHORTEST_RUN} to {LONGEST_RUN} tokens softmax can count from the first change of symbol, not "
            "before it (dotted: the earliest); of random tokens it can recognise the first, which alone sees nothing "
            "but itself, and count from there. These are accuracies after so many steps, not limits.",
            "{position}",
            *(_accuracy_table(results, task) for task in IDENTIFICATION if task in tasks),
            f"Of the first {SHORTEST_RUN} tokens of the runs, where nothing has changed yet, each model names "
            f"{_first_run(results)}; one that knows the symbol alone, {100 / SHORTEST_RUN:.1f} % at most.",
            *(
                f"Steps taken, {IDENTIFICATION[task]}:\n\n{_steps_table(results, task)}"
                for task in ("constant", "random")
                if task in tasks
            ),
            "**Tasks that use the position.** Even-token prediction asks each token for the one at the latest even "
            f"position, so that every second token must know that its own is odd; {SYMBOLS} symbols. Copying asks for "
            f"the token at position {COPIED}, and before it for a blank, which is not scored.",
            *(_accuracy_table(results, task) for task in USES if task in tasks),
            "**Twice the training length.** A classifier that was never shown the larger indices as answers names "
            f"none of them ({100 * max(beyond, default=0.0):.1f} % at most), and in the first half a decoder does what "
            "it does at the training length. Learned positions are not defined past it, and a mass without a finite "
            "horizon stays what it was at its end. The other tasks have answers "
            f"there. Accuracy in %, trained at {lengths[0]} tokens, on the first / the second half of twice as many:",
            _halves_table(results, [task for task in USES if task in tasks]),
            "**Where the gap is real**: relative encodings and lengths in which one kind is ahead of another, and "
            "the range of the differences in points.",
            _gap_table(results, tasks),
        )
    )


# The figure


def _figure(results: Results, length: int) -> tuple[Figure, str]:
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
    text = (
        "Accuracy of position identification by position: rows of panels for one token repeated, two symbols "
        "in long runs and random tokens, columns for rope, alibi and nope, a line for each kind of attention"
    )
    return figure, text


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
