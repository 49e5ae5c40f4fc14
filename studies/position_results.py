"""Accuracies of the position study by cell, and the rules by which they are judged."""

from __future__ import annotations

import math
from collections.abc import Sequence

from stablemask.evaluation.statistics import Estimate, estimate

from .position import ENCODINGS
from .study import Record
from .tasks import TASKS

# Accuracies: a task is solved from SOLVED on, at chance up to MARGIN above it, and MARGIN is a real gap.
SOLVED, MARGIN = 0.95, 0.03

Column = tuple[str, int]  # a relative encoding and a training length


class Results:
    """What came of each task, by encoding, kind and training length, one record a seed."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._cells: dict[tuple[str, str, str, int], dict[int, Record]] = {}
        for record in records:
            for task, result in record["tasks"].items():
                cell = task, record["encoding"], record["kind"], record["length"]
                self._cells.setdefault(cell, {})[record["seed"]] = result

    def of(self, task: str, encoding: str, kind: str, length: int) -> list[Record]:
        """Of each seed; empty where there are none."""
        return list(self._cells.get((task, encoding, kind, length), {}).values())

    def lengths(self, task: str) -> list[int]:
        """Training lengths of a task."""
        return sorted({length for of, _, _, length in self._cells if of == task})

    def columns(self, task: str) -> list[Column]:
        return [(encoding, length) for length in self.lengths(task) for encoding in ENCODINGS]

    def accuracy(self, task: str, encoding: str, kind: str, length: int) -> Estimate | None:
        of_cell = self.of(task, encoding, kind, length)
        return estimate([result["accuracy"] for result in of_cell]) if of_cell else None

    def of_kind(self, task: str, kind: str) -> dict[Column, Estimate]:
        """Accuracies with relative positions."""
        found = {
            (encoding, length): self.accuracy(task, encoding, kind, length)
            for encoding, length in self.columns(task)
        }
        return {column: accuracy for column, accuracy in found.items() if accuracy is not None}

    def differences(self, task: str, kind: str, other: str) -> dict[Column, Estimate]:
        """Accuracy of a kind less that of another, by the seeds that both have."""
        found = {}
        for encoding, length in self.columns(task):
            ours, theirs = (
                self._cells.get((task, encoding, name, length), {}) for name in (kind, other)
            )
            gaps = [ours[s]["accuracy"] - theirs[s]["accuracy"] for s in ours if s in theirs]
            if gaps:
                found[encoding, length] = estimate(gaps)
        return found


# None: one seed cannot tell.


def solved(accuracy: Estimate) -> bool | None:
    return None if math.isnan(accuracy.half_width) else accuracy.mean >= SOLVED


def at_chance(accuracy: Estimate, task: str, length: int) -> bool | None:
    return accuracy.below(TASKS[task].chance(length) + MARGIN)


def ahead(difference: Estimate) -> bool | None:
    return Estimate(-difference.mean, difference.half_width).below(-MARGIN)


def behind(difference: Estimate) -> bool | None:
    return difference.below(-MARGIN)
