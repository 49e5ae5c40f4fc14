"""Which cells a run measures. The full cross product would take hours; this one fits its budget.

The first head_dim and group at every length; the others at two lengths, where they show whether a
ratio depends on them. Rows that keep every score stop at ``rows.MAX_DENSE_LENGTH``. What is watched is
timed until its ratios are known, within the seconds of a cell (``timing.py``).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch

from .cases import HEADS, Case
from .rows import Row
from .timing import Budget

TOKENS = {"cpu": 2048, "cuda": 32768}  # of all sequences of a cell
OTHER_SHAPE_LENGTHS = (1024, 4096)
MASKED = ("alibi", "window", "documents")
MASK_LENGTHS = (1024, 2048, 4096)
LONG = 16384  # where peak memory is measured under every mask
# Above this a CPU takes seconds a call, and times what a user would call beside the floor.
MAX_DETAIL_LENGTH = 4096


@dataclass(frozen=True)
class Scope:
    """What the user chose; None is the default of the plan."""

    device: str
    quick: bool
    dtypes: list[str]
    lengths: list[int] | None
    head_dims: list[int]
    groups: list[int]

    @property
    def all_lengths(self) -> list[int]:
        default = [512, 4096] if self.quick else [512, 1024, 2048, 4096, 8192, 16384]
        return self.lengths or default

    @property
    def shapes(self) -> Iterator[tuple[int, int, bool]]:
        """head_dim, groups, and whether they are the first; one of the two varies at a time."""
        head_dim, groups = self.head_dims[0], self.groups[0]
        yield head_dim, groups, True
        if not self.quick:
            yield from ((other, groups, False) for other in self.head_dims[1:])
            yield from ((head_dim, other, False) for other in self.groups[1:])


class Planned(NamedTuple):
    case: Case
    rows: list[Row]
    budget: Budget


def length_cells(scope: Scope, rows: Iterable[Row]) -> Iterator[Planned]:
    """Forward, and forward and backward, by length."""
    rows = list(rows)
    for dtype, (head_dim, groups, first) in product(scope.dtypes, scope.shapes):
        lengths = scope.all_lengths
        if not first and scope.lengths is None:
            lengths = [length for length in lengths if length in OTHER_SHAPE_LENGTHS]
        for length in lengths:
            batch = max(1, TOKENS.get(scope.device, TOKENS["cpu"]) // length)
            heads = _heads(scope.device, length, groups)
            case = Case(scope.device, dtype, batch, length, length, head_dim, groups, heads=heads)
            budget = Budget(0.5 if scope.quick else 1.5, min_rounds=7)
            yield Planned(case, _chosen(rows, case, first), budget)


def _heads(device: str, length: int, groups: int) -> int:
    """All of them, and on a CPU fewer in long sequences, with a key head for each thread.

    Calls of many seconds in turn would each meet another machine.
    """
    heads = HEADS
    if device == "cpu":
        rows, fewest = HEADS * TOKENS[device], groups * torch.get_num_threads()
        while heads // 2 >= fewest and heads // 2 * length >= rows:
            heads //= 2
    return heads


def decode_cells(scope: Scope, rows: Iterable[Row]) -> Iterator[Planned]:
    """One token behind a cache."""
    rows = list(rows)
    caches = scope.lengths or ([1024, 16384] if scope.quick else [1024, 4096, 16384])
    for dtype, (head_dim, groups, first) in product(scope.dtypes, scope.shapes):
        for batch, length in product((1, 8) if first else (1,), caches):
            case = Case(scope.device, dtype, batch, 1, length, head_dim, groups)
            yield Planned(
                case, _chosen(rows, case, first and batch == 1), Budget(0.5, min_rounds=7)
            )


def mask_cells(scope: Scope, rows: Iterable[Row]) -> Iterator[Planned]:
    """Our op under each mask against stock SDPA given the same mask dense."""
    rows = [r for r in rows if not r.dense and (r.is_floor or r.computes == "stablemask")]
    lengths = scope.lengths or ((1024,) if scope.quick else MASK_LENGTHS)
    for dtype, mask, length in product(scope.dtypes, MASKED, lengths):
        batch = max(1, MASK_LENGTHS[-1] // length)
        case = Case(scope.device, dtype, batch, length, length, scope.head_dims[0], mask=mask)
        yield Planned(case, _chosen(rows, case, False), Budget(0.5))


def memory_cases(scope: Scope) -> list[Case]:
    """One sequence of every length, the shortest first."""
    head_dim, groups, _ = next(scope.shapes)
    return [
        Case(scope.device, dtype, 1, length, length, head_dim, groups)
        for dtype, length in product(scope.dtypes, sorted(scope.all_lengths))
    ]


def mask_memory_cases(scope: Scope) -> list[Case]:
    length = max(scope.lengths) if scope.lengths else (4096 if scope.quick else LONG)
    return [
        Case(scope.device, dtype, 1, length, length, scope.head_dims[0], mask=mask)
        for dtype, mask in product(scope.dtypes, ("causal", *MASKED))
    ]


def _chosen(rows: list[Row], case: Case, first: bool) -> list[Row]:
    if case.device != "cpu":
        return rows
    if not first:
        rows = [row for row in rows if not row.compiled]
    if not first or case.q_len > MAX_DETAIL_LENGTH:
        rows = [row for row in rows if not row.detail]
    return rows
