"""Triton's kernels in its interpreter, on the CPU, against what they mean in float64.

A program of its own, for TRITON_INTERPRET must be set before Triton is imported:

    TRITON_INTERPRET=1 python -m tests.backends.interpreted
"""

import itertools
import math

import torch

from stablemask.backends import triton_kernels
from stablemask.vllm import kernels
from stablemask.vllm.mass import Mass

BATCH, HEADS = 2, 3
EPS = torch.finfo(torch.float32).eps
SINKS = {
    "number": 0.3,
    "none": -math.inf,
    "everything": math.inf,
    "of a head": torch.randn(1, HEADS, 1, dtype=torch.bfloat16),
    "far away": 300 * torch.randn(BATCH, 1, 1),
}


def share_is_exact(dtype, n, dim, layout, sink, biased):
    """``out`` and ``lse`` as kernels return them: rows of heads, lse padded, blind rows with anything in them."""
    out = torch.randn(BATCH, n, HEADS, dim).to(dtype).transpose(1, 2)
    lse = 3 * torch.randn(BATCH, HEADS, 64)[..., :n]
    exact_sink = torch.as_tensor(sink).double().expand(BATCH, HEADS, n)
    top = None
    blind = torch.zeros(BATCH, HEADS, n, dtype=torch.bool)
    if biased:
        top = torch.zeros(BATCH, 1, 1).to(dtype)
        top[0] = -torch.inf
        top = top.expand(BATCH, HEADS, n)
        blind = top == -torch.inf
        out[0], lse[0] = math.nan, math.inf
    mass = lse.double().masked_fill(blind, -torch.inf)
    kept = torch.where(mass == -torch.inf, 0.0, torch.sigmoid(mass - exact_sink))
    exact = out.double().masked_fill(blind.unsqueeze(-1), 0.0) * kept.unsqueeze(-1)
    exact_total = torch.logaddexp(mass, exact_sink)
    result = out if layout == "in place" else torch.full((BATCH, HEADS, n, dim), math.nan).to(dtype)
    if isinstance(sink, torch.Tensor):
        sink = sink.expand(BATCH, HEADS, n)
    triton_kernels.take_share(out, lse, sink, top, result)
    # The factor is the exponential of a difference, which is rounded first; the interpreter cuts bfloat16 off.
    finite = torch.nan_to_num(mass - exact_sink, nan=0.0, posinf=0.0, neginf=0.0).abs().max()
    rounding = torch.finfo(dtype).eps + EPS * (16 + finite.item())
    tiny = torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(result.double(), exact, rtol=rounding, atol=tiny)
    torch.testing.assert_close(lse.double(), exact_total, rtol=4 * EPS, atol=8 * EPS)


def table_is_looked_up(heads, n, dtype):
    table = torch.randn(40, heads, 1)
    positions = torch.randint(-3, 60, (2, n)).to(dtype)
    for given in (positions, positions[:1].expand(2, n), positions.T.contiguous().T):
        expected = table[given.long().clamp(0, 39)].squeeze(-1).transpose(1, 2)
        assert torch.equal(triton_kernels.look_up(table, given), expected)


# Steps of vLLM: what each request had before, and its rows; then rows of padding.
STEPS = {
    "decoding": ([30, 0, 7, 45], [1, 1, 1, 1], 0),
    "a chunk of one": ([16], [11], 0),
    "chunks among tokens": ([9, 3, 0, 38, 60], [1, 6, 9, 1, 2], 0),
    "requests without rows": ([5, 2, 0, 8, 0, 0], [1, 0, 4, 1, 0, 0], 3),
}


def share_of_a_step_is_exact(dtype, step, by_head, dim, heads=6):
    past, counts, padding = STEPS[step]
    rows = sum(counts) + padding
    table, shift = torch.randn(40, heads if by_head else 1), torch.randn(heads if by_head else 1)
    table[-1] = -torch.inf
    out = torch.randn(rows, heads, dim + 3).to(dtype)[
        ..., :dim
    ]  # wider rows, as those of a cut tensor
    lse = 3 * torch.randn(heads, rows + 5)[:, :rows]
    lse[:, 0], lse[0] = (
        torch.inf,
        -torch.inf,
    )  # rows without keys: kernels tell the one or the other
    exact = out.double().clone()
    row = 0
    for before, count in zip(past, counts, strict=True):
        for position in range(before, before + count):
            sink = (table[min(position, 39)].double() + shift.double()).expand(heads)
            kept = 1 / (1 + torch.exp(sink - lse[:, row].double()))
            exact[row] *= torch.where(sink == -torch.inf, 1.0, kept).unsqueeze(-1)
            row += 1
    starts = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    lengths = torch.tensor([b + n for b, n in zip(past, counts, strict=True)], dtype=torch.int32)
    kernels.take_share(out, lse, Mass(table, shift), starts, lengths)
    rounding = torch.finfo(dtype).eps + EPS * 32
    tiny = torch.finfo(dtype).smallest_normal
    torch.testing.assert_close(out[:row].double(), exact[:row], rtol=rounding, atol=tiny)


def main():
    torch.manual_seed(0)
    for dtype, step, by_head in itertools.product(
        (torch.float32, torch.bfloat16), STEPS, (False, True)
    ):
        for dim in (8, 80):
            share_of_a_step_is_exact(dtype, step, by_head, dim)
    share_of_a_step_is_exact(torch.float16, "chunks among tokens", True, 256, heads=21)
    shapes = [(1, 64, "in place"), (5, 40, "apart")]
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for dtype, shape, name, biased in itertools.product(dtypes, shapes, SINKS, (False, True)):
        try:
            share_is_exact(dtype, *shape, SINKS[name], biased)
        except AssertionError as error:
            raise AssertionError(f"{dtype}, {shape}, a sink that is {name}, {biased=}") from error
    for heads, n, dtype in itertools.product((1, 8), (1, 300), (torch.int64, torch.int32)):
        table_is_looked_up(heads, n, dtype)


if __name__ == "__main__":
    main()
