"""Functions timed in turn in one process, so that a noisy machine disturbs all of them alike."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

BLOCK_SECONDS = 0.01  # a sample is as many calls as fill this, far above the timer's noise
MIN_ROUNDS, MAX_ROUNDS = 3, 11
# What takes this many times as long as the fastest needs no third decimal: it runs in some rounds.
SLOW, SLOW_STRIDE = 2.5, 5

Samples = dict[int, float]  # seconds per call by round


@dataclass(frozen=True)
class Budget:
    """How long the rounds of one cell may take in all, and how many there are at least and at most."""

    seconds: float
    min_rounds: int = MIN_ROUNDS
    max_rounds: int = MAX_ROUNDS


def interleave(
    functions: Mapping[str, Callable[[], object]],
    budget: Budget,
    device: str,
    always: Collection[str] = (),
) -> dict[str, Samples]:
    """Run every function once a round, in an order that turns; each has been called before.

    Returns:
        Seconds per call of every function, by round; slow functions that are not among ``always``
        miss some rounds.
    """
    names = list(functions)
    first = {name: _seconds(functions[name], 1, device) for name in names}
    calls = {name: max(1, math.ceil(BLOCK_SECONDS / first[name])) for name in names}
    fastest = min(first.values())
    strides = {
        name: SLOW_STRIDE if first[name] > SLOW * fastest and name not in always else 1
        for name in names
    }
    a_round = sum(first[name] * calls[name] / strides[name] for name in names)
    rounds = max(budget.min_rounds, min(budget.max_rounds, int(budget.seconds / a_round)))

    samples: dict[str, Samples] = {name: {} for name in names}
    gc.disable()
    try:
        for number in range(rounds):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                if number % strides[name] == 0:
                    samples[name][number] = _seconds(functions[name], calls[name], device)
    finally:
        gc.enable()
    return samples


def _seconds(function: Callable[[], object], calls: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


@dataclass(frozen=True)
class Summary:
    """Median milliseconds; the ratio to the floor is the median over rounds, with its quartiles."""

    ms: float
    ratio: float | None
    quartiles: tuple[float, float] | None
    samples: int


def summarise(samples: Samples, floor: Samples | None) -> Summary:
    """Ratios are taken within a round, where floor and row met the same machine."""
    ms = round(statistics.median(samples.values()) * 1e3, 4)
    if floor is None:
        return Summary(ms, None, None, len(samples))
    ratios = sorted(seconds / floor[number] for number, seconds in samples.items())
    low, middle, high = (
        statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    )
    return Summary(ms, round(middle, 3), (round(low, 3), round(high, 3)), len(samples))


def fastest(samples: Mapping[str, Samples], names: list[str]) -> Samples | None:
    """The samples of whichever of ``names`` has the lowest median."""
    present = [samples[name] for name in names if name in samples]
    return min(present, key=lambda rounds: statistics.median(rounds.values()), default=None)
