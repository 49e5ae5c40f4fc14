"""Which way of computing is the fastest on this processor: timed once, where the library is compiled.

Tiles that take half of the stock kernel's time on one processor take more than its own on another, and up to some
length the backward of half precision may be faster in float32. No list of features says where. So every way takes
turns with the stock kernel, by dtype and length, and has those lengths where it is clearly faster. They are kept
beside the library, in a file for each kind of processor.
"""

import hashlib
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...writing import write_whole

# The ways that may be faster than the stock kernel, and for which dtypes.
WAYS = {
    "forward_by_tiles": ("float32", "bfloat16"),
    "backward_by_tiles": ("float32", "bfloat16"),
    "backward_in_float32": ("bfloat16", "float16"),
}

# By way and dtype, either of which may be missing: the first and the last rows of each interval where the way is
# taken; None is without end.
Rules = dict[str, dict[str, list[tuple[int, int | None]]]]

# Tiles waste least where rows are a power of two, and most with one row more: what holds for both holds between.
SPANS = [(2**power + 1, 2 ** (power + 1)) for power in range(3, 13)]
LENGTHS = sorted(rows for ends in SPANS for rows in ends)
# A thread's numbers in the longest call; float16's backward takes seconds where nothing multiplies it.
_LONGEST = {"float32": 8192 * 64, "bfloat16": 8192 * 64, "float16": 2048 * 64}
_HEAD_DIMS = (64, 128)
_ENDLESS = 2**62
_LEAD = 0.97  # less is noise
_MIN_ROUNDS, _MAX_ROUNDS = 3, 9
_SAMPLE_SECONDS, _CELL_SECONDS, _SECONDS = 0.002, 0.06, 90.0


class Timing(NamedTuple):
    """Seconds of a way, and of the fastest of those that it would replace, by round."""

    way: str
    dtype: str
    rows: int
    ours: list[float]
    theirs: list[float]


def decide(timings: Iterable[Timing]) -> Rules:
    """Where each way is taken.

    That is between the two ends of a span if it is faster at both, whatever the head_dim: even its median is 3 %
    less than the best of the others. So noise, and what was not timed, choose the stock kernel. What is true of
    the longest rows is true beyond them.
    """
    faster: dict[tuple[str, str], dict[int, bool]] = {}
    for way, dtype, rows, ours, theirs in timings:
        of_rows = faster.setdefault((way, dtype), {})
        leads = statistics.median(ours) <= _LEAD * min(theirs)
        of_rows[rows] = leads and of_rows.get(rows, True)
    rules: Rules = {}
    for (way, dtype), of_rows in faster.items():
        intervals: list[tuple[int, int | None]] = []
        for first, last in SPANS:
            if of_rows.get(first) and of_rows.get(last):
                goes_on = intervals and intervals[-1][1] == first - 1
                start = intervals.pop()[0] if goes_on else first
                intervals.append((start, None if last == max(of_rows) else last))
        if intervals:
            rules.setdefault(way, {})[dtype] = intervals
    return rules


def noise(timings: Iterable[Timing]) -> float:
    """How many times its best time a call takes in the median: 1 on a machine that does nothing else."""
    return statistics.median(statistics.median(cell.theirs) / min(cell.theirs) for cell in timings)


def everywhere(*ways: str) -> Rules:
    return {way: {dtype: [(1, None)] for dtype in WAYS[way]} for way in ways}


def as_numbers(rules: Rules) -> list[int]:
    """As the library reads them: the way, the dtype, the first and the last rows of each interval."""
    dtypes = list(_LONGEST)
    return [
        number
        for place, way in enumerate(WAYS)
        for dtype, intervals in rules.get(way, {}).items()
        for first, last in intervals
        for number in (place, dtypes.index(dtype), first, _ENDLESS if last is None else last)
    ]


def is_faster(rules: Rules, way: str, dtype: torch.dtype, rows: int) -> bool:
    intervals = rules.get(way, {}).get(str(dtype).removeprefix("torch."), [])
    return any(first <= rows and (last is None or rows <= last) for first, last in intervals)


def measure(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    follow: Callable[[Rules], None],
    lengths: Iterable[int] = LENGTHS,
) -> Iterator[Timing]:
    """Time the ways against each other, with one head for each thread, the shorter calls first.

    Args:
        attend: of query, key and value, by what ``follow`` was given last, forward and backward.
    """
    end = time.perf_counter() + _SECONDS
    for rows in lengths:
        for head_dim in _HEAD_DIMS:
            for dtype, longest in _LONGEST.items():
                if rows * head_dim <= longest and time.perf_counter() < end:
                    yield from _measure(attend, follow, rows, head_dim, dtype)


def _measure(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    follow: Callable[[Rules], None],
    rows: int,
    head_dim: int,
    dtype: str,
) -> Iterator[Timing]:
    shape = (max(1, 1024 // rows), rows, torch.get_num_threads(), head_dim)
    # Where heads lie beside each other, as projections make them.
    *tensors, grad = (
        torch.randn(shape).to(getattr(torch, dtype)).transpose(1, 2) for _ in range(4)
    )
    ways = [way for way, dtypes in WAYS.items() if dtype in dtypes]

    def race(kind: str, function: Callable[[], object]) -> Iterator[Timing]:
        times = _in_turn(function, follow, [way for way in ways if way.startswith(kind)])
        theirs = times.pop("stock")
        for way in reversed(WAYS):  # the last first: it is what stands against tiles
            if way in times:
                yield Timing(way, dtype, rows, times[way], theirs)
                theirs = min(theirs, times[way], key=statistics.median)

    with torch.no_grad():
        yield from race("forward", lambda: attend(*tensors))
    leaves = [tensor.requires_grad_() for tensor in tensors]
    with torch.enable_grad():
        out = attend(*leaves)
    yield from race("backward", lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True))


def _in_turn(
    function: Callable[[], object], follow: Callable[[Rules], None], ways: list[str]
) -> dict[str, list[float]]:
    """Seconds of a call by the stock kernel, "stock", and by each way, in rounds that begin with another."""
    rules = {"stock": everywhere()} | {way: everywhere(way) for way in ways}
    names = list(rules)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + _CELL_SECONDS
    for number in range(_MAX_ROUNDS if ways else 0):
        if number > _MIN_ROUNDS and time.perf_counter() > end:
            break
        for name in names:
            follow(rules[name])
            calls, taken, start = 0, 0.0, time.perf_counter()
            while taken < _SAMPLE_SECONDS:
                function()
                calls, taken = calls + 1, time.perf_counter() - start
            times[name].append(taken / calls)
        names.append(names.pop(0))
    return {name: seconds[1:] for name, seconds in times.items()}  # the first round warms up


def processor() -> str:
    """The kind of this processor, as the system names it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            lines = file.read(4096).splitlines()  # of the first core
    except OSError:
        lines = []
    told = {
        name.strip(): value.strip()
        for name, _, value in (line.partition(":") for line in reversed(lines))
    }
    kinds = (
        "model name",
        "cpu family",
        "model",
        "stepping",
        "CPU implementer",
        "CPU variant",
        "CPU part",
    )
    found = [f"{kind} {told[kind]}" for kind in kinds if told.get(kind)]
    return ", ".join(found) or platform.processor() or platform.machine()


def path_beside(library: Path) -> Path:
    """Where the rules for a library and this processor are, or would be."""
    kind = hashlib.sha256(processor().encode()).hexdigest()[:8]
    return library.with_name(f"{library.name}.{kind}.json")


def write(rules: Rules, path: Path) -> None:
    """Whole, or not at all."""
    record = {"processor": processor(), "threads": torch.get_num_threads(), "rules": rules}
    write_whole(path, json.dumps(record) + "\n")


def read(path: Path) -> Rules | None:
    """What was written there; None if nothing was, on another processor, or if it is not that."""
    try:
        record = json.loads(path.read_bytes())
        return _checked(record["rules"]) if record["processor"] == processor() else None
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def _checked(rules: Any) -> Rules:
    """The same rules in their own types; raises what comes of anything else."""
    checked: Rules = {}
    for way, of_way in rules.items():
        dtypes = WAYS[way]
        checked[way] = {}
        for dtype, intervals in of_way.items():
            ends = [end for first, last in intervals for end in (first, last)]
            if ends[-1] is None:
                ends[-1] = ends[-2] + 1
            ascend = all(type(end) is int for end in ends) and sorted({0, *ends}) == [0, *ends]
            if dtype not in dtypes or not ascend or ends[-1] > _ENDLESS:
                raise ValueError(f"no intervals for {way} in {dtype}")
            checked[way][dtype] = [(first, last) for first, last in intervals]
    return checked


def digest(rules: Rules) -> str:
    """A few letters that stand for them."""
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()[:8]


def in_words(rules: Rules) -> dict[str, str]:
    """By dtype, what is not the stock kernel's."""
    words: dict[str, str] = {}
    for dtype in _LONGEST:
        parts = []
        for way in WAYS:
            ranges = [
                f"from {first:,} on" if last is None else f"{first:,} to {last:,}"
                for first, last in rules.get(way, {}).get(dtype, [])
            ]
            if ranges:
                parts.append(f"{way.replace('_', ' ')}, rows {' and '.join(ranges)}")
        words[dtype] = "; ".join(parts) or "the stock kernel"
    return words
