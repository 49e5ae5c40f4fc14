"""What the mass leaves of an attention's output, in one launch a layer: a kernel of Triton's, for CUDA.

It finds the position of each row itself, from what vLLM's kernels read too. So a step prepares nothing, and a
CUDA graph that was captured with these tensors is right whenever they are filled anew: nothing here is
allocated, nor read by the host.

Letters: T rows of a step, R requests, P positions of a table, H query heads of this rank, D head_dim.
"""

import triton
import triton.language as tl
from torch import Tensor

from .mass import Mass

# Numbers of ``out`` that one program has at once.
_NUMBERS_IN_BLOCK = 4096

# Of these no value is worth a compilation of its own.
_ANY_VALUE = [
    "out_t",
    "out_h",
    "lse_h",
    "lse_t",
    "table_h",
    "shift_h",
    "requests",
    "length",
    "heads",
]


@triton.jit(do_not_specialize=_ANY_VALUE)
def _take_share(
    out, lse, table, shift, starts, lengths,
    out_t, out_h, lse_h, lse_t, table_h, shift_h,
    requests, length, heads, dim,
    HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    # The request of a row is the last that begins at it or before it; in a step of decoding, that of its number.
    guess = tl.minimum(row, requests - 1)
    found = (tl.load(starts + guess) <= row) & (row < tl.load(starts + guess + 1))
    low, high = tl.where(found, guess, 0), tl.where(found, guess, requests - 1)
    while low < high:
        middle = (low + high + 1) // 2
        begun = tl.load(starts + middle) <= row
        low, high = tl.where(begun, middle, low), tl.where(begun, high, middle - 1)
    position = tl.load(lengths + low) - tl.load(starts + low + 1) + row
    position = tl.minimum(tl.maximum(position, 0), length - 1)  # of padding it may be anything

    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = head < heads
    # A table of one column is that of all heads, and its rows are as long.
    width = 1 + (heads - 1) * table_h
    at = table + position.to(tl.int64) * width + head * table_h
    sink = tl.load(at, mask=inside, other=0.0) + tl.load(
        shift + head * shift_h, mask=inside, other=0.0
    )
    visible = tl.load(lse + head * lse_h + row * lse_t, mask=inside, other=0.0)
    # Two of -inf have no difference: a row without keys, in a layer without a mass.
    kept = tl.where(sink == float("-inf"), 1.0, 1.0 / (1.0 + tl.exp(sink - visible)))

    column = tl.arange(0, WIDTH)[None, :]
    here = inside[:, None] & (column < dim)
    out += row.to(tl.int64) * out_t + head[:, None] * out_h + column
    product = tl.load(out, mask=here, other=0.0).to(tl.float32) * kept[:, None]
    tl.store(out, product.to(out.dtype.element_ty), mask=here)


def take_share(
    out: Tensor, lse: Tensor, mass: Mass, query_start_loc: Tensor, seq_lens: Tensor
) -> None:
    """``out *= sigmoid(lse - sink)``, the sink logit being that of a row's position and head.

    Args:
        out: (T, H, D), the last axis contiguous.
        lse: (H, T), float32; that of a row without keys may be -inf or inf.
        mass: of the layer.
        query_start_loc: (R + 1,), see :func:`~.mass.row_positions`.
        seq_lens: (R,).
    """
    rows, heads, dim = out.shape
    width = triton.next_power_of_2(dim)
    block = max(1, min(_NUMBERS_IN_BLOCK // width, triton.next_power_of_2(heads)))
    _take_share[(rows, triton.cdiv(heads, block))](
        out, lse, *mass, query_start_loc, seq_lens,
        *out.stride()[:2], *lse.stride(), int(mass.table.shape[1] > 1), int(len(mass.shift) > 1),
        len(seq_lens), len(mass.table), heads, dim,
        HEADS=block, WIDTH=width,
    )  # fmt: skip
