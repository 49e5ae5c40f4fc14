"""What a sink leaves of an attention's output, and a look into a table: kernels of Triton's, for CUDA.

A decoding step is bound by launches: each of these is one, where elementary operations take three and two.
Nothing else imports Triton, and :func:`~.hardware.triton_kernels` this, where a tensor is on CUDA.

Letters: B batch, H query heads, n query rows, D head_dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers of ``out`` that one program has at once.
_NUMBERS_IN_BLOCK = 2048


# Of these no value is worth a compilation of its own.
_ANY_VALUE = [
    *(f"{name}_{axis}" for name in ("lse", "sink", "top") for axis in "bhn"), "num_rows", "heads", "n",
]  # fmt: skip


@triton.jit(do_not_specialize=_ANY_VALUE)
def _take_share(
    out, result, lse, sink, top,
    out_b, out_h, out_n, result_b, result_h, result_n, lse_b, lse_h, lse_n,
    sink_b, sink_h, sink_n, top_b, top_h, top_n,
    num_rows, heads, n, dim,
    SINK_IS_NUMBER: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    place = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = place < num_rows
    row, head, batch = place % n, place // n % heads, place // (n * heads)

    lse += batch * lse_b + head * lse_h + row * lse_n
    mass = tl.load(lse, mask=inside, other=0.0)
    if SINK_IS_NUMBER:
        sink_logit = sink + tl.zeros_like(mass)
    else:
        sink += batch * sink_b + head * sink_h + row * sink_n
        sink_logit = tl.load(sink, mask=inside, other=0.0).to(tl.float32)
    # By the exponential of their distance, which overflows for none; of two of -inf there is no difference.
    apart = tl.where(mass == sink_logit, 1.0, tl.exp(-tl.abs(mass - sink_logit)))
    kept = tl.where(sink_logit < mass, 1.0, apart) / (1.0 + apart)
    total = tl.maximum(mass, sink_logit) + tl.log(1.0 + apart)
    if BIASED:
        # A row that sees nothing, of which kernels say this and that.
        top += batch * top_b + head * top_h + row * top_n
        blind = tl.load(top, mask=inside, other=0.0).to(tl.float32) == float("-inf")
        total = tl.where(blind, sink_logit, total)
    tl.store(lse, total, mask=inside)

    column = tl.arange(0, WIDTH)[None, :]
    at = inside[:, None] & (column < dim)
    out += (batch * out_b + head * out_h + row * out_n)[:, None] + column
    product = tl.load(out, mask=at, other=0.0).to(tl.float32) * kept[:, None]
    if BIASED:
        product = tl.where(blind[:, None], 0.0, product)
    result += (batch * result_b + head * result_h + row * result_n)[:, None] + column
    tl.store(result, product.to(result.dtype.element_ty), mask=at)


def check() -> None:
    """Raise what stands in the way, if anything does: Triton needs a C compiler and Python's headers too."""
    out, lse = torch.zeros(1, 1, 1, 16, device="cuda"), torch.zeros(1, 1, 1, device="cuda")
    take_share(out, lse, 0.0, None, out)


def take_share(
    out: Tensor, lse: Tensor, sink: Tensor | float, top: Tensor | None, result: Tensor
) -> None:
    """``result = out * sigmoid(lse - sink)``, which may be ``out``, and ``lse = logaddexp(lse, sink)``.

    Args:
        out, result: (B, H, n, D), the last axis contiguous.
        lse: (B, H, n), float32.
        sink: a number, or (B, H, n) by whatever strides.
        top: (B, H, n), the largest bias of each row: one of -inf sees nothing; None where there is no bias.
    """
    batch, heads, n, dim = out.shape
    num_rows = batch * heads * n
    width = triton.next_power_of_2(dim)
    rows = max(1, min(_NUMBERS_IN_BLOCK // width, triton.next_power_of_2(num_rows)))
    none = (0, 0, 0)
    # Triton launches on the present device, not on that of the tensors.
    with torch.cuda.device_of(out):
        _take_share[(triton.cdiv(num_rows, rows),)](
            out, result, lse, sink if isinstance(sink, Tensor) else float(sink), top,
            *out.stride()[:3], *result.stride()[:3], *lse.stride(),
            *(sink.stride() if isinstance(sink, Tensor) else none), *(none if top is None else top.stride()),
            num_rows, heads, n, dim,
            SINK_IS_NUMBER=not isinstance(sink, Tensor), BIASED=top is not None, ROWS=rows, WIDTH=width,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_numbers", "length", "heads", "n", "positions_b", "positions_n"])
def _look_up(
    table, positions, result, num_numbers, length, heads, n, positions_b, positions_n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_numbers
    row, head, batch = place % n, place // n % heads, place // (n * heads)
    at = batch.to(tl.int64) * positions_b + row.to(tl.int64) * positions_n
    position = tl.load(positions + at, mask=inside, other=0).to(tl.int64)
    position = tl.minimum(tl.maximum(position, 0), length - 1)
    tl.store(result + place, tl.load(table + position * heads + head, mask=inside), mask=inside)


def look_up(table: Tensor, positions: Tensor) -> Tensor:
    """Rows of a table (length, H, 1), contiguous, at positions (B, n), or the nearest there is: (B, H, n)."""
    batch, n = positions.shape
    length, heads, _ = table.shape
    result = table.new_empty(batch, heads, n)
    num_numbers = result.numel()
    block = min(256, triton.next_power_of_2(max(num_numbers, 1)))
    with torch.cuda.device_of(table):
        _look_up[(triton.cdiv(num_numbers, block),)](
            table,
            positions,
            result,
            num_numbers,
            length,
            heads,
            n,
            *positions.stride(),
            BLOCK=block,
        )
    return result
