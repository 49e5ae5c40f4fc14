"""Time our attention against stock SDPA on this machine."""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from stablemask.attention import stable_mask_attention
from stablemask.backends import native
from stablemask.cli.env import DTYPES, available_devices
from stablemask.cli.options import BenchOptions
from stablemask.errors import InputError, RunError

HEADS, HEAD_DIM = 8, 64
TOKENS = (
    2048  # of all sequences of a cell; the definition stores every score, and checks no longer ones
)
SECONDS = 2.5  # for each cell
ROUNDS = 5  # at least
BLOCK_SECONDS = 0.005  # a sample is as many calls as fill this, far above the clock's noise

Function = Callable[[], object]


def run(options: BenchOptions) -> None:
    if min(options.lengths, default=0) < 2:
        raise InputError(f"lengths must be at least 2 each, got {options.lengths}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = available_devices()[device]
    if device == "cpu":
        name += f", {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    compiled = "not compiled" if native.LIBRARY is None else "compiled"
    print(f"{name}; torch {torch.__version__}; backend native {compiled}")
    print(f"our time over stock SDPA's, {HEADS} heads of {HEAD_DIM}; below 1 ours is faster\n")
    print(f"{'tokens':<27}" + "".join(f"{length:>8,}" for length in options.lengths))
    for dtype in DTYPES[device]:
        lines: dict[str, str] = {}
        for length in options.lengths:
            for kind, ours, stock in _cells(length, getattr(torch, dtype), device):
                # Inference is as a user runs it, which lets the compiled library serve.
                with torch.set_grad_enabled("backward" in kind):
                    ratio = _ratio(ours, stock, device)
                lines[kind] = lines.get(kind, "") + f"{ratio:>8.2f}"
        for kind, ratios in lines.items():
            print(f"{dtype:<10}{kind:<17}{ratios}", flush=True)


def _cells(
    length: int, dtype: torch.dtype, device: str
) -> Iterator[tuple[str, Function, Function]]:
    """What is timed: ours, and the stock call."""
    # (batch, heads, length, head_dim), in the memory order of a model's projections.
    query, key, value, grad = (
        torch.randn(max(1, TOKENS // length), length, HEADS, HEAD_DIM, dtype=dtype, device=device)
        .transpose(1, 2)
        .requires_grad_(name != "grad")
        for name in ("query", "key", "value", "grad")
    )
    leaves = (query, key, value)
    given = [tensor.detach() for tensor in leaves]
    cached = [given[0][:1, :, -1:], *(tensor[:1].contiguous() for tensor in given[1:])]
    ours: Callable[..., Tensor] = partial(stable_mask_attention, gamma=1 / length)
    stock: Callable[..., Tensor] = F.scaled_dot_product_attention
    if length <= TOKENS:
        _check(ours, *(tensor[:1] for tensor in given))
        _check(ours, *cached)
    causal: Callable[..., Tensor] = partial(stock, is_causal=True)
    yield "forward", partial(ours, *given), partial(causal, *given)
    yield (
        "forward+backward",
        lambda: torch.autograd.grad(ours(*leaves), leaves, grad),
        lambda: torch.autograd.grad(causal(*leaves), leaves, grad),
    )
    yield "decoding", partial(ours, *cached), partial(stock, *cached)


@torch.no_grad()
def _check(ours: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> None:
    """A few roundings of the largest value are allowed."""
    exact = ours(query.double(), key.double(), value.double(), backend="reference")
    error = float((ours(query, key, value) - exact).abs().max())
    allowed = 4 * torch.finfo(query.dtype).eps * float(value.abs().max())
    if not error <= allowed:
        raise RunError(f"our output in {query.dtype} is {error:.1e} off, {allowed:.1e} are allowed")


def _ratio(ours: Function, stock: Function, device: str) -> float:
    """The median over rounds, each of which begins with the other one."""
    for function in (ours, stock):  # warm
        function()
    calls = max(1, round(BLOCK_SECONDS / _seconds(stock, 1, device)))
    ratios: list[float] = []
    end = time.perf_counter() + SECONDS
    while len(ratios) < ROUNDS or time.perf_counter() < end:
        order = (ours, stock) if len(ratios) % 2 else (stock, ours)
        taken = {function: _seconds(function, calls, device) for function in order}
        ratios.append(taken[ours] / taken[stock])
    return statistics.median(ratios)


def _seconds(function: Function, calls: int, device: str) -> float:
    wait = torch.cuda.synchronize if device == "cuda" else int
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    wait()
    return time.perf_counter() - start
