"""One workload: every row built, checked and timed in turn; and its peak memory."""

import contextlib
import gc
import io
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from stablemask.models.cost import flops_per_token
from stablemask.models.devices import peak_flops

from ..correctness import IncorrectError
from ..measure import Measured
from ..memory import can_measure, counts_live, in_fresh_process, peak, reset_peak
from ..timing import Budget, Samples, fastest, interleave, summarise
from .check import Reference
from .rows import ROWS
from .workload import Contender, Workload

BLOCK_SECONDS = 1.0  # a sample is as many steps as fill this
MIN_ROUNDS = 7


def measure_training(
    workload: Workload, *, names: Sequence[str] = tuple(ROWS), seconds: float, memory: bool
) -> Measured:
    """Tokens per second of whole training loops on one workload, and their ratios in the same rounds.

    Args:
        names: of :data:`ROWS`.
        seconds: for softmax and StableMask after the first rounds, until their ratio is known.
        memory: measure peak memory too, on the CPU in a process for itself.
    """
    measured = Measured()
    mib: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        contenders = _correct_ones(workload, names, Path(folder), measured, mib)
        timers = {name: contender.run for name, contender in contenders.items()}
        budget = Budget(seconds, min_rounds=MIN_ROUNDS)
        samples = interleave(
            timers, budget, floors=["softmax"], watched=["stablemask"], block_seconds=BLOCK_SECONDS
        )
    if memory and samples and not counts_live(workload.device):
        mib = in_fresh_process(peak_mib, workload, list(samples))
    ours = samples.get("softmax")
    best = fastest(samples, [name for name in names if not ROWS[name].is_ours])
    for name, own in samples.items():
        rate = workload.tokens / summarise(own, None).ms * 1e3
        record = {
            "row": name, "preset": workload.preset, "dtype": workload.dtype,
            "batch": workload.batch_size, "context": workload.context, "compile": workload.compile,
            "tokens_per_second": round(rate, 1),
            "of_softmax": _speed(own, ours), "of_best_other": _speed(own, best),
            "samples": len(own), "mib": mib.get(name), "utilization": _utilization(workload, rate),
        }  # fmt: skip
        measured.rows.append(record)
    return measured


def _correct_ones(
    workload: Workload,
    names: Sequence[str],
    folder: Path,
    measured: Measured,
    mib: dict[str, float],
) -> dict[str, Contender]:
    """The rows that can be built and compute what they should; where it is counted, their peak memory in ``mib``."""
    references: dict[str, Reference] = {}
    contenders = {}
    for name in names:
        row = ROWS[name]
        try:
            if row.attention not in references:
                references[row.attention] = Reference(workload, row.attention)
            gc.collect()
            counted = counts_live(workload.device)
            before = reset_peak(workload.device) if counted else 0
            contender = row.build(workload, folder / name)
            worst = references[row.attention].check(contender)
            _check_that_it_learns(contender, workload)
            if counted:  # the optimizer has its moments by now
                reset_peak(workload.device)
                contender.run(1)
                mib[name] = round((peak(workload.device) - before) / 2**20, 1)
        except Exception as error:
            labels = {"row": name, "pass": f"{workload.preset}, {workload.dtype}"}
            measured.leave_out(error, **labels)
            continue
        measured.worst = max(measured.worst, worst)
        contenders[name] = contender
    return contenders


def _check_that_it_learns(contender: Contender, workload: Workload) -> None:
    """Two steps on the one batch must lower its loss; they warm the loop up, too."""
    ids = workload.blocks().ids.to(workload.device)
    before = contender.loss(ids).item()
    contender.run(2)
    after = contender.loss(ids).item()
    if not after < before:
        raise IncorrectError(f"the loss of the batch goes from {before:.4f} to {after:.4f}")


def peak_mib(workload: Workload, names: Sequence[str]) -> dict[str, float]:
    """MiB of each row while it trains: weights, gradients, optimizer and all. In a process for itself."""
    if not can_measure(workload.device):
        return {}
    small = Workload("tiny", workload.dtype, 1, workload.device, workload.compile)
    found = {}
    with tempfile.TemporaryDirectory() as folder, _quiet():
        for name in names:
            ROWS[name].build(small, Path(folder) / f"{name}-small").run(
                1
            )  # loads what is imported late
            gc.collect()
            before = reset_peak(workload.device)
            contender = ROWS[name].build(workload, Path(folder) / name)
            contender.run(1)  # from the second step on an optimizer has its moments
            reset_peak(workload.device)
            contender.run(1)
            found[name] = round((peak(workload.device) - before) / 2**20, 1)
            del contender
    return found


def _speed(own: Samples, floor: Samples | None) -> float | None:
    ratio = summarise(own, floor).ratio
    return None if ratio is None else round(1 / ratio, 3)


def _utilization(workload: Workload, tokens_per_second: float) -> float | None:
    """Share of the device's FLOP/s; the sink logit costs none worth counting."""
    peak = peak_flops(torch.device(workload.device), getattr(torch, workload.dtype))
    if peak is None:
        return None
    flops = flops_per_token(workload.config, workload.context).training
    return round(flops * tokens_per_second / peak, 3)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Each loop reports in its own way; none does here."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
