"""Which way of computing is the fastest on this processor: timed once, where the library is compiled.

Tiles that take half of the stock kernel's time on one processor take more than its own on another, and up to some
length the backward of half precision may be faster in float32. No list of features says where. So every way takes
turns with the stock kernel, by dtype and length, and has those lengths where it is clearly faster. They are kept
beside the library, in a file for each kind of processor.
"""

import hashlib
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
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
_EDGES = (8, 16, 32, 48, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SPANS = [(below + 1, last) for below, last in pairwise(_EDGES)]
LENGTHS = sorted(rows for ends in SPANS for rows in ends)
# A thread's numbers in the longest call; float16's backward takes seconds where nothing multiplies it.
_LONGEST = {"float32": 8192 * 64, "bfloat16": 8192 * 64, "float16": 2048 * 64}
_HEAD_DIMS = (64, 128)
_ENDLESS = 2**62
_LEAD = 0.97  # less is noise
_MIN_ROUNDS, _MAX_ROUNDS = 3, 9
_SAMPLE_SECONDS, _CELL_SECONDS, _SECONDS = 0.002, 0.06, 90.0


class Timing(NamedTuple):
    """Seconds of a way, and of the fastest of those that it would replace, by round.

    The clock ran ``delay`` times as long.
    """

    way: str
    dtype: str
    rows: int
    ours: list[float]
    theirs: list[float]
    delay: float = 1.0


def decide(timings: Iterable[Timing]) -> Rules:
    """Where each way is taken.

    That is between the two ends of a span if it is faster at both, whatever the head_dim: even its median is 3 %
    less than the best of the others. So noise, and what was not timed, choose the stock kernel. What is true of
    the longest rows is true beyond them.
    """
    faster: dict[tuple[str, str], dict[int, bool]] = {}
    for way, dtype, rows, ours, theirs, _ in timings:
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


def delay(timings: Iterable[Timing]) -> float:
    """How many times what long calls compute the clock runs: about 1 where nothing else runs."""
    return statistics.median([cell.delay for cell in timings if cell.rows >= 1024] or [math.inf])


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
    """Time the ways against each other, the shorter calls first.

    As many threads as PyTorch takes compute at once, each a call of its own, for they share caches and units. What
    counts is the time that a thread has computed: by the clock, a thread that waits for a core is a slow kernel.

    Args:
        attend: of query, key and value, by what ``follow`` was given last, forward and backward.
    """
    end = time.perf_counter() + _SECONDS
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=partial(torch.set_num_threads, 1)) as pool:
            for rows in lengths:
                for head_dim in _HEAD_DIMS:
                    for dtype, longest in _LONGEST.items():
                        if rows * head_dim <= longest and time.perf_counter() < end:
                            yield from _measure(
                                attend, follow, rows, head_dim, dtype, pool, threads
                            )
    finally:
        torch.set_num_threads(threads)


def _measure(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    follow: Callable[[Rules], None],
    rows: int,
    head_dim: int,
    dtype: str,
    pool: ThreadPoolExecutor,
    threads: int,
) -> Iterator[Timing]:
    shape = (max(1, 1024 // rows), 1, rows, head_dim)
    calls = [
        [torch.randn(shape).to(getattr(torch, dtype)) for _ in range(4)] for _ in range(threads)
    ]
    ways = [way for way, dtypes in WAYS.items() if dtype in dtypes]

    def race(kind: str, functions: list[Callable[[], object]]) -> Iterator[Timing]:
        here = [way for way in ways if way.startswith(kind)]
        times, delay = _in_turn(functions, follow, here, pool)
        theirs = times.pop("stock")
        for way in reversed(WAYS):  # the last first: it is what stands against tiles
            if way in times:
                yield Timing(way, dtype, rows, times[way], theirs, delay)
                theirs = min(theirs, times[way], key=statistics.median)

    yield from race("forward", [partial(attend, *tensors) for *tensors, _ in calls])
    backward: list[Callable[[], object]] = []
    for *tensors, grad in calls:
        leaves = tuple(tensor.requires_grad_() for tensor in tensors)
        with torch.enable_grad():
            out = attend(*leaves)
        backward.append(partial(torch.autograd.grad, out, leaves, grad, retain_graph=True))
    yield from race("backward", backward)


def _in_turn(
    functions: list[Callable[[], object]],
    follow: Callable[[Rules], None],
    ways: list[str],
    pool: ThreadPoolExecutor,
) -> tuple[dict[str, list[float]], float]:
    """Seconds of a call by the stock kernel, "stock", and by each way, in rounds that begin with another.

    Returns:
        Them, and how many times that the clock has run.
    """
    rules = {"stock": everywhere()} | {way: everywhere(way) for way in ways}
    names = list(rules)
    times: dict[str, list[float]] = {name: [] for name in names}
    computed, start = 0.0, time.perf_counter()
    for number in range(_MAX_ROUNDS if ways else 0):
        if number > _MIN_ROUNDS and time.perf_counter() > start + _CELL_SECONDS:
            break
        for name in names:
            follow(rules[name])
            found = list(pool.map(_sample, functions))
            computed += max(seconds * calls for seconds, calls in found)
            times[name].append(statistics.fmean(seconds for seconds, _ in found))
        names.append(names.pop(0))
    delay = (time.perf_counter() - start) / computed if computed else 1.0
    return {name: seconds[1:] for name, seconds in times.items()}, delay  # the first round warms up


def _sample(function: Callable[[], object]) -> tuple[float, int]:
    """Seconds that this thread computes in each of some calls, and how many those are."""
    calls, taken, start = 0, 0.0, time.thread_time()
    while taken < _SAMPLE_SECONDS:
        function()
        calls, taken = calls + 1, time.thread_time() - start
    return taken / calls, calls


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
