"""The attention against stock SDPA (the floor) and the dense definition.

Every row computes on the same tensors: ``tokens // length`` sequences, 8 heads of 64. A round runs
every row once, in turn, and a ratio is the median over rounds of a row's time over the floor's time
in the same round, so that a noisy machine disturbs both sides alike.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..attention import stable_mask_attention
from ..pseudo import dense_stable_mask
from .memory import peak_memory

HEADS, HEAD_DIM = 8, 64
MAX_DENSE_LENGTH = 2048  # the definition keeps several (heads, length, length) tensors a sequence
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def stock(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return stable_mask_attention(query, key, value, gamma=1 / query.shape[2])


def definition(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The paper's formula as it stands; its horizon is the length."""
    n = query.shape[2]
    causal, pseudo = dense_stable_mask(n, 1 / n, dtype=query.dtype, device=query.device)
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    return (torch.softmax(scores * causal + pseudo, -1) * causal) @ value


ROWS: dict[str, Attention] = {
    "sdpa": stock,
    "stablemask": ours,
    "definition": definition,
}


@dataclass(frozen=True)
class Timing:
    """Milliseconds, and ratios to stock SDPA in the same rounds; peak memory in MiB."""

    row: str
    dtype: str
    length: int
    batch: int
    forward_ms: float
    forward_ratio: float
    both_ms: float
    both_ratio: float
    peak_mib: float | None
    peak_ratio: float | None


def check() -> float:
    """Largest distance of our op from the definition in float64, outputs and gradients.

    Raises:
        AssertionError: it is above 1e-6 (sink logits are float32), so no time would mean anything.
    """
    torch.manual_seed(0)
    inputs = [torch.randn(1, 4, 65, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    grad = torch.randn(1, 4, 65, 16, dtype=torch.float64)
    results = []
    for attend in (
        lambda *t: stable_mask_attention(*t, gamma=1 / 65, horizon=65),
        definition,
    ):
        out = attend(*inputs)
        results.append((out, *torch.autograd.grad(out, inputs, grad)))
    worst = max((a - b).abs().max().item() for a, b in zip(*results, strict=True))
    assert worst < 1e-6, f"our op is {worst} from the definition"
    return worst


def measure(
    lengths: list[int],
    dtypes: list[str],
    *,
    tokens: int,
    rounds: int,
    device: torch.device,
    memory: bool,
) -> Iterator[Timing]:
    """Time every row at every length and dtype; yields as it goes."""
    for dtype in dtypes:
        for length in lengths:
            batch = max(1, tokens // length)
            rows = {
                name: attend
                for name, attend in ROWS.items()
                if name != "definition" or length <= MAX_DENSE_LENGTH
            }
            times = _times(rows, batch, length, getattr(torch, dtype), rounds, device)
            peaks = {
                name: peak_memory(name, length, dtype, device) if memory else None for name in rows
            }
            for name in rows:
                yield Timing(
                    name, dtype, length, batch,
                    *_summary(times, name, "forward"),
                    *_summary(times, name, "both"),
                    peaks[name], _ratio(peaks[name], peaks["sdpa"]),
                )  # fmt: skip


def _times(
    rows: dict[str, Attention],
    batch: int,
    length: int,
    dtype: torch.dtype,
    rounds: int,
    device: torch.device,
) -> dict[tuple[str, str], list[float]]:
    query, key, value, grad = make_tensors(batch, length, dtype, device)
    inputs = (query, key, value)
    times: dict[tuple[str, str], list[float]] = {}
    names = list(rows)
    for number in range(-2, rounds):  # two rounds to warm up
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            attend = rows[name]
            with torch.no_grad():
                forward = _seconds(partial(attend, *inputs), device)
            both = _seconds(partial(_forward_and_backward, attend, inputs, grad), device)
            if number >= 0:
                times.setdefault((name, "forward"), []).append(forward)
                times.setdefault((name, "both"), []).append(both)
    return times


def _forward_and_backward(
    attend: Attention, inputs: tuple[Tensor, Tensor, Tensor], grad: Tensor
) -> tuple[Tensor, ...]:
    return torch.autograd.grad(attend(*inputs), inputs, grad)


def make_tensors(
    batch: int, length: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Query, key, value and the gradient of the output, in the memory order of a model's."""
    query, key, value, grad = (
        torch.randn(batch, length, HEADS, HEAD_DIM, dtype=dtype, device=device).transpose(1, 2)
        for _ in range(4)
    )
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_(), grad


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def _summary(
    times: dict[tuple[str, str], list[float]], name: str, kind: str
) -> tuple[float, float]:
    """Median milliseconds, and the median ratio to stock SDPA."""
    own, floor = times[name, kind], times["sdpa", kind]
    ratio = statistics.median(a / b for a, b in zip(own, floor, strict=True))
    return round(statistics.median(own) * 1e3, 3), round(ratio, 3)


def _ratio(value: float | None, floor: float | None) -> float | None:
    return None if value is None or not floor else round(value / floor, 3)
