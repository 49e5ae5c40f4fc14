"""The stock kernels: the CPU's backward in either precision, the shapes of CUDA's on the meta device
anywhere, and their numbers where there is a GPU."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stablemask import (
    head_decay_rates,
    sink_attention,
)
from stablemask.backends import native
from stablemask.backends.stock import kernels
from stablemask.backends.stock.kernels import KERNELS
from stablemask.backends.stock.tiles import Tiling
from stablemask.masks import Masks
from tests.oracle import (
    assert_no_further_than_twice,
    doubled,
    gradients,
    make_inputs,
    sink_definition,
)


# The flash kernel takes no bias; calls that have one go to the efficient kernel.
@pytest.mark.parametrize(
    ("name", "padding"),
    [("cuda", False), *itertools.product(["cudnn", "efficient"], [False, True])],
)
@pytest.mark.parametrize(("rows", "keys", "causal"), [(37, 37, True), (5, 40, False)])
def test_shapes_of_the_cuda_kernels(name, padding, rows, keys, causal):
    query = torch.empty(2, rows, 4, 16, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    key = torch.empty(2, keys, 2, 16, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    bias = key.new_empty(2, 1, 1, keys) if padding else None
    kernel = KERNELS[name]
    out, lse = kernel.forward(query, key, key, bias, causal, 0.25)
    assert out.shape == query.shape
    assert lse.shape == (2, 4, rows)
    assert lse.dtype == torch.float32
    grads = kernel.backward(out, query, key, key, out, lse, bias, causal, 0.25)
    assert [grad.shape for grad in grads] == [query.shape, key.shape, key.shape]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "meta"}, "no stock flash kernel"),
        ({"device": "cuda", "dtype": torch.float64}, "float64"),
        ({"device": "cuda", "dim": 257}, "head_dim"),
    ],
)
def test_flash_says_what_it_cannot_do(changes, reason):
    with FakeTensorMode():
        query = torch.empty(
            1, 1, 4, changes.get("dim", 8),
            dtype=changes.get("dtype", torch.float32), device=changes["device"],
        )  # fmt: skip
        sink = torch.zeros(1, 1, device=changes["device"])
        with pytest.raises(ValueError, match=reason):
            sink_attention(query, query, query, sink, backend="flash")


def test_cudnn_says_what_it_cannot_do():
    with FakeTensorMode():
        query = torch.empty(1, 1, 4, 8, device="cuda")
        sink = torch.zeros(1, 1, device="cuda")
        with pytest.raises(ValueError, match="float16 and bfloat16"):
            sink_attention(query, query, query, sink, backend="cudnn")


# One of the two key heads of two sequences at a time, a sequence, all; None: in half precision.
@pytest.mark.parametrize("threads", [None, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masks", [{}, {"window": 40}, {"alibi_slopes": head_decay_rates(4)}])
def test_backward_of_half_precision_on_the_cpu(masks, dtype, threads, monkeypatch):
    monkeypatch.setattr(kernels, "_faster_in_float32", lambda query, key: threads is not None)
    monkeypatch.setattr(kernels, "_SLICE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    inputs = make_inputs(2, 4, 2, 96, 96, 32, dtype)
    exact_inputs = doubled(inputs)
    distance = torch.arange(96).unsqueeze(-1) - torch.arange(96)
    visible = distance < masks.get("window", 96)
    slopes = masks.get("alibi_slopes", torch.zeros(4)).double()
    bias = -slopes.view(4, 1, 1) * distance
    exact = sink_definition(
        *exact_inputs, torch.zeros(1, 1, dtype=torch.float64), visible=visible, bias=bias
    )
    grad = torch.randn_like(exact).to(dtype)
    truth = gradients(exact, exact_inputs, grad)
    ours, dense = (
        gradients(sink_attention(*inputs, 0.0, backend=backend, **masks), inputs, grad)
        for backend in ("flash", "reference")
    )
    assert [gradient.dtype for gradient in ours] == [dtype] * 3
    assert_no_further_than_twice(ours, dense, truth, (grad * exact).abs().sum(-1).max())


def test_where_the_backward_of_half_precision_is_in_float32(monkeypatch):
    """Between the keys where it was timed to be faster, however few rows there are."""
    monkeypatch.setattr(native, "RULES", {"backward_in_float32": {"bfloat16": [(17, 256)]}})

    def converts(keys, dtype=torch.bfloat16):
        return kernels._faster_in_float32(
            *(torch.empty(1, 1, n, 8, dtype=dtype) for n in (5, keys))
        )

    assert [converts(keys) for keys in (16, 17, 256, 257)] == [False, True, True, False]
    assert not any(converts(64, dtype) for dtype in (torch.float16, torch.float32, torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_of_alibi_are_rounded_once(dtype):
    slopes, length = head_decay_rates(12), 600  # of which most are not a number of half precision
    masks = Masks(alibi_slopes=slopes)
    tiling = Tiling(masks, length, length, 0, batch=1, dtype=dtype, device=torch.device("cpu"))
    for tile in itertools.chain.from_iterable(map(tiling.tiles, tiling.blocks())):
        row = torch.arange(tile.rows.start, tile.rows.stop).unsqueeze(-1)
        key = torch.arange(tile.keys.start, tile.keys.stop)
        shift = 0.0
        if tile.shift is not None:  # one number a key, counted from the first row
            row = row[:1]
            offset = torch.arange(tile.rows.stop - tile.rows.start)
            shift = tile.shift - offset * slopes.double().unsqueeze(-1)
        exact = -slopes.double().view(1, -1, 1, 1) * (row - key)
        once = torch.finfo(dtype).eps / 2 * 1.001 * exact.abs() + torch.finfo(dtype).tiny
        assert ((tile.bias.double() - exact).abs() <= once).all()
        assert abs(torch.as_tensor(shift)).max() <= 1e-4
