"""Functions timed in turn in one process, so that a noisy machine disturbs all of them alike."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

BLOCK_SECONDS = 0.01  # a sample is as many calls as fill this, far above the clock's noise
STRIDE = 3  # what is not watched runs in every third round,
NEAR = 1.25  # until it is known to take less than this many times as long as what is
PRECISION = 0.006  # the standard error with which a ratio that is watched is known well enough

Samples = dict[int, float]  # seconds per call by round
Timer = Callable[[int], float]  # seconds that so many calls take


@dataclass(frozen=True)
class Budget:
    """How many rounds one cell has at least, and how long what is watched may go on after them.

    It goes on, with what comes near it, until its ratios are known to ``PRECISION``, the seconds are
    over, or there are enough.
    """

    seconds: float
    min_rounds: int = 4
    max_rounds: int = 101


def interleave(
    timers: Mapping[str, Timer],
    budget: Budget,
    *,
    floors: Collection[str],
    watched: Collection[str],
    block_seconds: float | None = None,
) -> dict[str, Samples]:
    """Time functions in turn, round by round, in an order that turns; each has been called before.

    Args:
        floors, watched: names; the ratios of the second to the fastest of the first are to be exact.
        block_seconds: a sample is as many calls as fill this; by default :data:`BLOCK_SECONDS`.

    Returns:
        Seconds per call of every function, by round.
    """
    block = BLOCK_SECONDS if block_seconds is None else block_seconds
    first = {name: timer(1) for name, timer in timers.items()}
    calls = {name: max(1, math.ceil(block / seconds)) for name, seconds in first.items()}
    exact = [name for name in timers if name in floors or name in watched]
    samples: dict[str, Samples] = {name: {} for name in timers}

    def run(number: int, names: list[str]) -> None:
        shift = number % max(1, len(names))
        for name in names[shift:] + names[:shift]:
            known = first[name] if number == 0 and calls[name] == 1 else None
            samples[name][number] = known or timers[name](calls[name]) / calls[name]

    for number in range(budget.min_rounds):
        run(number, exact if number % STRIDE else list(timers))
    medians = {name: statistics.median(times.values()) for name, times in samples.items()}
    near = NEAR * max((medians[name] for name in timers if name in watched), default=0.0)
    exact = [name for name in timers if name in exact or medians[name] < near]
    a_round = sum(medians[name] * calls[name] for name in exact)
    end = time.perf_counter() + budget.seconds
    for number in range(budget.min_rounds, budget.max_rounds):
        if time.perf_counter() + a_round > end or _are_known(samples, floors, watched):
            break
        run(number, exact)
    return samples


def _are_known(
    samples: Mapping[str, Samples], floors: Collection[str], watched: Collection[str]
) -> bool:
    floor = fastest(samples, floors)
    return floor is not None and all(
        _standard_error(_ratios(samples[name], floor)) <= PRECISION
        for name in watched
        if name in samples
    )


def _standard_error(ratios: list[float]) -> float:
    """Of the median, from the quartiles, which a round that met a busy machine does not move."""
    if len(ratios) < 2:
        return math.inf
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    deviation = (high - low) / 1.349  # of a normal distribution with these quartiles
    return math.sqrt(math.pi / 2 / len(ratios)) * deviation


def _ratios(samples: Samples, floor: Samples) -> list[float]:
    """In the rounds that both ran in."""
    return [seconds / floor[number] for number, seconds in samples.items() if number in floor]


def timer(function: Callable[[], object], device: str) -> Timer:
    """Of short calls, which the garbage collector would be a part of by chance."""

    def seconds(calls: int) -> float:
        gc.disable()
        try:
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                function()
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start
        finally:
            gc.enable()

    return seconds


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
    ratios = _ratios(samples, floor)
    low, middle, high = (
        statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    )
    return Summary(ms, round(middle, 3), (round(low, 3), round(high, 3)), len(samples))


def fastest(samples: Mapping[str, Samples], names: Collection[str]) -> Samples | None:
    """The samples of whichever of ``names`` has the lowest median."""
    present = [samples[name] for name in names if name in samples]
    return min(present, key=lambda rounds: statistics.median(rounds.values()), default=None)
