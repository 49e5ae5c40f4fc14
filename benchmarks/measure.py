"""One cell of a table: every row checked, then all of them timed in turn."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from typing import Any

import torch

from .cases import Case, Inputs, make_inputs
from .correctness import IncorrectError, check
from .rows import MAX_DENSE_LENGTH, Row
from .timing import Budget, fastest, interleave, summarise, timer

# Passes: inference without gradients, training, and one token behind a cache.
FORWARD, TRAINING, DECODE = "forward", "forward+backward", "decode"


@dataclass
class Measured:
    """What was measured, of a cell of a table or of a workload.

    Attributes:
        rows: one dict a row and pass; times in milliseconds, ratios to the fastest floor.
        not_timed: one dict a row and pass with the ``reason``; ``incorrect`` rows among them.
        worst: the largest distance from the definition, as a share of what is allowed.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    not_timed: list[dict[str, Any]] = field(default_factory=list)
    worst: float = 0.0

    def leave_out(self, error: Exception, **labels: Any) -> None:
        """Others fail in their own ways; one that does is a line of the report, not the end of the run."""
        said = isinstance(error, (CannotServeError, IncorrectError, NotImplementedError))
        reason = str(error).strip().partition("\n")[0]
        reason = reason if said else f"{type(error).__name__}: {reason}"
        incorrect = isinstance(error, IncorrectError)
        self.not_timed.append({**labels, "reason": reason, "incorrect": incorrect})


class CannotServeError(Exception):
    """Why a row is not timed, in the benchmark's own words."""


def measure(case: Case, rows: Iterable[Row], budget: Budget) -> Measured:
    """Check and time ``rows`` forward and, unless the case decodes, forward and backward.

    The second, which is what most is said about, may take three times the seconds of ``budget``.
    """
    cell = Measured()
    inputs = make_inputs(case)
    forward = DECODE if case.q_len < case.kv_len else FORWARD
    with torch.no_grad():
        _measure_pass(cell, case, forward, rows, inputs.detached(), budget)
    if forward is FORWARD:
        longer = replace(budget, seconds=3 * budget.seconds)
        _measure_pass(cell, case, TRAINING, rows, inputs, longer)
    return cell


def _measure_pass(
    cell: Measured, case: Case, kind: str, rows: Iterable[Row], inputs: Inputs, budget: Budget
) -> None:
    labels = {name: value for name, value in asdict(case).items() if name != "device"}
    labels["pass"] = kind
    functions, served = {}, {}
    for row in rows:
        try:
            functions[row.name], distance = prepare(case, row, inputs, backward=kind is TRAINING)
        except Exception as error:
            cell.leave_out(error, row=row.name, **labels)
            continue
        served[row.name] = row
        cell.worst = max(cell.worst, distance)
    if not functions:
        return
    floors = [name for name, row in served.items() if row.is_floor]
    watched = [name for name, row in served.items() if row.watched]
    timers = {name: timer(function, case.device) for name, function in functions.items()}
    samples = interleave(timers, budget, floors=floors, watched=watched)
    floor = fastest(samples, floors)
    for name, row in served.items():
        summary = asdict(summarise(samples[name], floor))
        cell.rows.append({"row": name, "computes": row.computes, **labels, **summary})


def prepare(
    case: Case, row: Row, inputs: Inputs, *, backward: bool
) -> tuple[Callable[[], object], float]:
    """The function to time, which has been checked and is warm, and its share of the tolerance.

    Raises:
        CannotServeError, NotImplementedError: the row is not for this case.
        IncorrectError: it is not what it claims to be.
        Exception: others fail in their own ways.
    """
    if row.dense and case.q_len > MAX_DENSE_LENGTH:
        raise CannotServeError(f"keeps every score; timed up to {MAX_DENSE_LENGTH} queries")
    if row.package and find_spec(row.package) is None:
        raise CannotServeError(f"needs the package {row.package}")
    run = row.build(case, inputs)
    distance = check(case, row, inputs, run, backward=backward)
    if not backward:
        return run, distance
    leaves = row.leaves(inputs)
    return lambda: torch.autograd.grad(run(), leaves, inputs.grad), distance
