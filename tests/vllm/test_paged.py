"""Both ways to attend over a server's paged cache on a CPU, against the definition in float64."""

import copy
import math

import pytest
import torch

from stablemask.vllm.mass import Mass, row_positions, share_of_wider, sink_of_all_rows
from tests.marks import native_library
from tests.oracle import assert_no_further_than_twice, sink_definition

BLOCK, PAGES = 32, 64
ROWS, LENGTHS = [1, 7, 1, 40, 3, 0, 90], [1, 7, 65, 40, 33, 5, 130]  # of each request
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def masses(heads):
    falling = -torch.arange(50.0)[:, None] * torch.linspace(0.01, 0.2, heads) + 2
    yield "one", Mass(falling[:, :1].contiguous(), torch.zeros(1))
    falling[:3] = -math.inf
    yield "by head", Mass(falling, torch.linspace(-1, 1, heads))
    yield "none", Mass(torch.full((1, 1), -math.inf), torch.zeros(1))


class Batch:
    """Requests with all that a kernel is given."""

    def __init__(self, dtype, heads=6, key_heads=2, dim=32):
        self.query = torch.randn(sum(ROWS), heads, dim).to(dtype)
        self.keys, self.values = (
            [torch.randn(key_heads, n, dim).to(dtype) for n in LENGTHS] for _ in range(2)
        )
        self.starts = torch.tensor([0, *ROWS]).cumsum(0).int()
        self.lengths = torch.tensor(LENGTHS, dtype=torch.int32)
        self.positions = row_positions(self.starts, self.lengths, sum(ROWS))

    def defined(self, mass, dtype, window=None, slopes=None):
        """(T, H, D)."""
        outs = []
        for request, (rows, length) in enumerate(zip(ROWS, LENGTHS)):
            begin = int(self.starts[request])
            positions = self.positions[begin : begin + rows]
            distance = positions[:, None] - torch.arange(length)
            outs.append(
                sink_definition(
                    self.query[begin : begin + rows].transpose(0, 1)[None].to(dtype),
                    self.keys[request][None].to(dtype),
                    self.values[request][None].to(dtype),
                    mass.at(positions).T.to(dtype),
                    visible=None if window is None else distance < window,
                    bias=None if slopes is None else -slopes[:, None, None].to(dtype) * distance,
                )[0].transpose(0, 1)
            )
        return torch.cat(outs)

    def holds(self, out, mass, **kwargs):
        exact = self.defined(mass, torch.float64, **kwargs)
        dense = self.defined(mass, self.query.dtype, **kwargs)
        term = max(value.abs().max().item() for value in self.values)
        assert_no_further_than_twice([out], [dense], [exact], term)


def attend_natively(batch, mass, window=None, slopes=None):
    key_heads, dim = batch.keys[0].shape[0], batch.query.shape[2]
    cache = torch.full((PAGES, key_heads, BLOCK, 2 * dim), math.nan, dtype=batch.query.dtype)
    pages = torch.randperm(PAGES - 1)[: 7 * 5].view(7, 5).int() + 1  # of page 0 nobody's
    for request, length in enumerate(LENGTHS):
        places = torch.arange(length)
        slots = pages[request, places // BLOCK] * BLOCK + places % BLOCK
        slots = torch.cat([slots, torch.tensor([-1])])  # padding
        key, value = (
            torch.nn.functional.pad(x[request].transpose(0, 1), (0, 0, 0, 0, 0, 1))
            for x in (batch.keys, batch.values)
        )
        torch.ops.stablemask.paged_write(key, value, slots.long(), cache)
    if window is not None:  # what no row sees may be given away
        for request, (rows, length) in enumerate(zip(ROWS, LENGTHS)):
            pages[request, : max(0, length - rows + 1 - window) // BLOCK] = 0
    out = torch.full_like(batch.query, math.nan)
    scale = dim**-0.5
    torch.ops.stablemask.paged_attention(
        batch.query,
        cache,
        pages,
        batch.starts,
        batch.lengths,
        *mass,
        slopes,
        scale,
        window or 0,
        out,
    )
    return out


@native_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "key_heads", "dim"), [(6, 2, 32), (4, 4, 64), (7, 1, 24)])
@pytest.mark.parametrize("kwargs", [{}, {"window": 20}, {"slopes": True}], ids=str)
def test_our_kernels_over_pages(dtype, heads, key_heads, dim, kwargs):
    if "slopes" in kwargs:
        kwargs = {"slopes": torch.linspace(0.02, 0.5, heads)}
    batch = Batch(dtype, heads, key_heads, dim)
    for _, mass in masses(heads):
        batch.holds(attend_natively(batch, mass, **kwargs), mass, **kwargs)


@native_library
def test_a_long_prompt_by_rows_is_what_it_is_by_tiles():
    """Where there are no tiles (here: of float16), more rows than are kept at once."""
    batch = Batch(torch.float16)
    _, mass = next(masses(6))
    assert sum(ROWS) > 128
    batch.holds(attend_natively(batch, mass), mass)


@native_library
def test_what_does_not_fit_is_not_read():
    batch = Batch(torch.float32)
    cache = torch.zeros(4, 2, BLOCK, 2 * 16)
    with pytest.raises(RuntimeError, match="does not fit heads of"):
        torch.ops.stablemask.paged_write(batch.query, batch.query, torch.zeros(1).long(), cache)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_wider_heads_make_a_constant_sink_exact(dtype):
    """Without the library: a kernel with one sink logit per head, here written out."""
    heads, dim, wide = 6, 32, 64
    batch = Batch(dtype, heads)
    for name, mass in masses(heads):
        constant = sink_of_all_rows(mass, heads)
        assert (mass.at(batch.positions) <= constant).all()
        wider = copy.copy(batch)
        wider.values = [torch.nn.functional.pad(x, (0, wide - dim)) for x in batch.values]
        for values in wider.values:
            values[..., dim] = 1
        stock = wider.defined(Mass(constant[None], torch.zeros(1)), torch.float32).to(dtype)
        out = share_of_wider(stock, dim, mass, batch.positions)
        exact = batch.defined(mass, torch.float64)
        # The share and the mean of the values are rounded to the dtype, and their quotient: three roundings.
        bound = 3 * torch.finfo(dtype).eps * max(x.abs().max() for x in batch.values)
        assert (out.double() - exact).abs().max() <= max(bound, 1e-5), name
