"""A sequence that attends to itself, in the compiled library: outputs and gradients."""

import math
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stablemask import sink_attention, stable_mask_attention
from stablemask.backends.native import tuning
from stablemask.backends.stock import kernels
from tests.marks import native_library
from tests.oracle import assert_no_further_than_twice, doubled, gradients, make_inputs
from tests.rules import BY_TILES, can_be_tiled, rules

pytestmark = native_library


def tensors(dtype=torch.float32, length=19, **kwargs):
    return make_inputs(2, 4, 2, length, length, 8, dtype, **kwargs)


@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 4),
    key_heads=st.integers(1, 3),
    length=st.sampled_from([1, 2, 7, 63, 64, 65, 128, 200]),
    head_dim=st.one_of(st.integers(1, 70), st.sampled_from([16, 32, 48, 64, 128])),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    sink_dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    shared=st.tuples(*[st.booleans()] * 3),
    axes=st.sampled_from([2, 3]),
    tokens_first=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    ways=st.sets(st.sampled_from(sorted(tuning.WAYS))),
    seed=st.integers(0, 99),
)
def test_every_shape(
    batch, groups, key_heads, length, head_dim, dtype, sink_dtype, shared, axes, tokens_first,
    scale, ways, seed,
):  # fmt: skip
    torch.manual_seed(seed)
    heads = groups * key_heads
    inputs = make_inputs(batch, heads, key_heads, length, length, head_dim, dtype)
    sizes = [1 if one else size for one, size in zip(shared, (batch, heads, length), strict=True)]
    sink = torch.randn(sizes[3 - axes :]).to(sink_dtype).requires_grad_()
    grad = torch.randn(batch, heads, length, head_dim).to(dtype)
    if tokens_first:
        *inputs, grad = (
            t.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
            for t in (*inputs, grad)
        )
    leaves = (*inputs, sink)
    grad = grad.detach()

    def differentiated(leaves, **keywords):
        out = sink_attention(*leaves, scale=scale, **keywords)
        return out, *gradients(out, leaves, grad)

    exact = differentiated(doubled(leaves), backend="reference")
    with rules(tuning.everywhere(*ways)):
        out = sink_attention(*inputs, sink, scale=scale, backend="native")
        assert [d.dtype for d in gradients(out, leaves, grad)] == [t.dtype for t in leaves]
        ours = differentiated(leaves)
        assert torch.equal(ours[0], out)
        with torch.no_grad():
            alone = sink_attention(*inputs, sink, scale=scale)
        assert torch.equal(alone, out)
    if dtype == torch.float64:
        terms = batch * groups * (2 * length + 2 * head_dim)
        for found, truth in zip(ours[:4], exact[:4], strict=True):
            allowed = 4 * terms * torch.finfo(dtype).eps * max(1.0, truth.detach().abs().max())
            torch.testing.assert_close(found, truth, rtol=0, atol=float(allowed))
        torch.testing.assert_close(ours[4], exact[4].to(sink_dtype))
        return
    dense = differentiated(leaves, backend="reference")
    term = (grad * exact[0]).abs().sum(-1).max()
    term = term * max(1.0, *(head_dim**-0.5 * t.detach().abs().max() for t in inputs[:2]))
    assert_no_further_than_twice(ours[:4], dense[:4], exact[:4], term)
    # The sink's is a sum over rows, rounded to its own precision in the end.
    rows = batch * heads * length
    eps = max(torch.finfo(t).eps for t in (dtype, sink_dtype))
    allowed = 2 * (dense[4].double() - exact[4]).abs().max() + 4 * eps * term * rows**0.5
    assert (ours[4].double() - exact[4]).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["gamma", "number", "taken", "free"])
def test_what_stands_for_the_sink(kind, dtype):
    inputs = tensors(dtype)
    grad = torch.randn(2, 4, 19, 8)
    sink = {"number": 0.4, "taken": math.inf, "free": -math.inf}.get(kind)

    def attend(**keywords):
        if kind == "gamma":
            return stable_mask_attention(*inputs, gamma=0.05, **keywords)
        return sink_attention(*inputs, sink, **keywords)

    ours, general = attend(), attend(backend="flash")
    assert torch.equal(attend(backend="native"), ours)
    found, expected = ((out, *gradients(out, inputs, grad)) for out in (ours, general))
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype in (torch.float32, torch.float64) else {}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)
    if kind == "taken":
        assert not any(t.any() for t in found)


@pytest.mark.parametrize("by_tiles", [False, True])
def test_sinks_that_take_nothing_and_all_have_gradients(by_tiles, use_rules):
    use_rules(BY_TILES if by_tiles else {})
    inputs = make_inputs(2, 4, 2, 19, 19, 16, torch.float32)
    values = [[-math.inf], [math.inf], [200.0], [-200.0]]
    sink = torch.tensor(values, requires_grad=True)
    found, expected = (
        gradients(out, (*inputs, sink), torch.ones(2, 4, 19, 16))
        for out in (
            sink_attention(*inputs, sink),
            sink_attention(*inputs, sink, backend="reference"),
        )
    )
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)])
def test_gradients_that_are_asked_for(wanted):
    inputs = (*tensors(), torch.zeros(4, 1, requires_grad=True))
    grad = torch.randn(2, 4, 19, 8)
    everything = gradients(sink_attention(*inputs), inputs, grad)
    some = [t if i in wanted else t.detach() for i, t in enumerate(inputs)]
    found = gradients(sink_attention(*some), tuple(inputs[i] for i in wanted), grad)
    assert all(torch.equal(ours, everything[i]) for ours, i in zip(found, wanted, strict=True))
    assert not sink_attention(*(t.detach() for t in inputs)).requires_grad


@pytest.mark.parametrize("value_dim", [5, 24])
@pytest.mark.parametrize("scale", [None, -0.4, 0.0])
def test_any_value_dim_and_scale(value_dim, scale):
    inputs = make_inputs(2, 4, 2, 19, 19, 8, torch.float64, value_dim)
    inputs = (*inputs, torch.randn(4, 1, dtype=torch.float64, requires_grad=True))
    grad = torch.randn(2, 4, 19, value_dim, dtype=torch.float64)
    found, expected = (
        (out, *gradients(out, inputs, grad))
        for out in (
            sink_attention(*inputs, scale=scale, backend=backend)
            for backend in ("native", "reference")
        )
    )
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


def test_transforms_and_autocast_are_served():
    query, key, value = tensors()
    expected = sink_attention(query, key, value, 0.5, backend="flash")
    grads = gradients(expected, (query, key, value), torch.ones_like(expected))
    total = lambda *args: sink_attention(*args, 0.5).sum()  # noqa: E731
    found = torch.func.grad(total, argnums=(0, 1, 2))(query, key, value)
    for ours, other in zip(found, grads, strict=True):
        torch.testing.assert_close(ours, other)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = sink_attention(query, key, value, 0.5, backend="native")
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.02, atol=0.02)


def test_it_cannot_be_differentiated_twice():
    query, key, value = tensors()
    out = sink_attention(query, key, value, 0.5)
    once = torch.autograd.grad(out.sum(), query, create_graph=True)
    expected = torch.autograd.grad(sink_attention(query, key, value, 0.5).sum(), query)
    torch.testing.assert_close(once, expected)
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(once[0].sum(), query)


def test_in_inference_mode():
    query, key, value = (t.detach() for t in tensors())
    expected = sink_attention(query, key, value, 0.5)
    with torch.inference_mode():
        assert torch.equal(sink_attention(query, key, value, 0.5, backend="native"), expected)


@pytest.mark.parametrize("threads", [3, 8])
@pytest.mark.parametrize("by_tiles", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_do_not_depend_on_threads(dtype, by_tiles, threads, use_rules):
    use_rules(BY_TILES if by_tiles else {})
    # The stock kernel's are those of a library that promises nothing of them; there only what we make of its output.
    promised = by_tiles and can_be_tiled(dtype)
    inputs = make_inputs(2, 4, 2, 200, 200, 32, dtype)
    inputs = (*inputs, torch.zeros(4, 1, requires_grad=True))
    grad = torch.randn(2, 4, 200, 32).to(dtype)
    stock = sink_attention(*inputs)

    def run():
        if not promised:
            return torch.autograd.grad(stock, inputs[3:], grad, retain_graph=True)
        out = sink_attention(*inputs)
        return out, *gradients(out, inputs, grad)

    _assert_same_bits(run, threads)


@pytest.mark.parametrize("shape", [(1,), (150,)])
def test_the_bits_of_a_sink_that_all_share_do_not_depend_on_threads(shape, use_rules):
    use_rules(BY_TILES)
    inputs = [t.detach() for t in make_inputs(64, 8, 8, 150, 150, 16, torch.float32)]
    sink = torch.zeros(1, *shape, requires_grad=True)
    grad = torch.randn(64, 8, 150, 16)
    _assert_same_bits(lambda: gradients(sink_attention(*inputs, sink), (sink,), grad), threads=3)


def _assert_same_bits(run, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run()
        for count in {2, threads}:
            torch.set_num_threads(count)
            assert all(map(torch.equal, run(), expected))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_numbers_that_are_not_finite(dtype, use_rules):
    use_rules(BY_TILES)
    query, key, value = (t.detach() for t in make_inputs(1, 1, 1, 150, 150, 32, dtype))
    expected = sink_attention(query, key, value, 0.3)
    damaged = key.clone()
    damaged[0, 0, 100, 3] = math.nan
    out = sink_attention(query, damaged, value, 0.3)
    assert torch.equal(out[:, :, :100], expected[:, :, :100])
    assert out[:, :, 100:].isnan().all()
    # Scores of -inf for the first keys: the rows there see nothing.
    query, damaged = query.abs(), key.clone()
    damaged[:, :, :70] = -math.inf
    out = sink_attention(query, damaged, value, 0.3)
    assert not out[:, :, :70].any()
    seen = torch.arange(150) >= 70
    masked = sink_attention(query, key, value, 0.3, attn_mask=seen, backend="reference")
    torch.testing.assert_close(out, masked, rtol=0, atol=4 * torch.finfo(dtype).eps)


SWITCHED_OFF = """
import torch
from stablemask import sink_attention
if {in_python}:
    torch.backends.mkldnn.flags(enabled=False).__enter__()
torch.manual_seed(0)
for dtype in (torch.float32, torch.bfloat16):
    query = torch.randn(1, 1, 100, 32).clamp(-2, 2).to(dtype)  # a rounding of 2 is 2 epsilon
    ours = sink_attention(query, query, query, 0.3)
    exact = sink_attention(*[query.double()] * 3, 0.3, backend="reference")
    assert (ours.double() - exact).abs().max() < 8 * torch.finfo(dtype).eps, dtype
"""


@pytest.mark.parametrize("held_to", ["AVX2", "AVX512_CORE", None])
def test_without_onednns_products_it_is_the_stock_kernel(held_to):
    """PyTorch or oneDNN refuses packed matrices there, or takes them for unpacked ones."""
    held = {} if held_to is None else {"ONEDNN_MAX_CPU_ISA": held_to}
    code = SWITCHED_OFF.format(in_python=held_to is None)
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | held, check=False)
    assert done.returncode == 0


def test_a_long_backward_in_float32_is_the_operators(monkeypatch, use_rules):
    use_rules(tuning.everywhere("backward_in_float32"))
    in_slices = Mock(wraps=kernels._cpu_backward_in_float32)
    monkeypatch.setattr(kernels, "_cpu_backward_in_float32", in_slices)
    inputs = make_inputs(2, 4, 2, 300, 300, 64, torch.float16)
    sink = torch.randn(4, 1, requires_grad=True)
    grad = torch.randn(2, 4, 300, 64).half()
    found, expected = (
        gradients(sink_attention(*inputs, sink, backend=backend), (*inputs, sink), grad)
        for backend in ("auto", "flash")
    )
    assert in_slices.call_count == 2
    for one, other in zip(found, expected, strict=True):
        # The two ways round the output apart.
        eps = torch.finfo(torch.float16).eps
        torch.testing.assert_close(one, other, rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("length", [256, 257])
def test_a_head_of_more_queries_than_a_thread_keeps_gradients_of(length, use_rules):
    """Tiles of the backward keep those of 2 ** 21 numbers; what is longer is the stock kernel's."""
    inputs = make_inputs(1, 1, 1, length, length, 8192, torch.float32)
    grad = torch.randn(1, 1, length, 8192)
    found = []
    for others in ({}, tuning.everywhere("backward_by_tiles")):
        use_rules(others)
        found.append(gradients(sink_attention(*inputs, 0.5), inputs, grad))
    by_tiles = length == 256 and can_be_tiled(torch.float32)
    assert all(map(torch.equal, *found)) != by_tiles
    for ours, stock in zip(*found, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-5 * stock.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", tuning.WAYS)
def test_a_way_is_taken_between_its_rows(way, dtype, use_rules):
    """Bits tell which kernel has computed; both are the definition's."""
    name = str(dtype).removeprefix("torch.")

    def differentiated(length):
        torch.manual_seed(0)
        inputs = make_inputs(1, 2, 1, length, length, 32, dtype)
        grad = torch.randn(1, 2, length, 32).to(dtype)
        out = sink_attention(*inputs, 0.3)
        exact = sink_attention(*doubled(inputs), 0.3, backend="reference")
        assert (out.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max()
        return out, *gradients(out, inputs, grad)

    lengths = (63, 64, 65, 128, 129)
    use_rules({})
    stock = [differentiated(length) for length in lengths]
    use_rules({way: {name: [(64, 64), (128, None)]}})
    changed = [
        [not torch.equal(*pair) for pair in zip(differentiated(length), of_stock, strict=True)]
        for length, of_stock in zip(lengths, stock, strict=True)
    ]
    there = name in tuning.WAYS[way] and (way == "backward_in_float32" or can_be_tiled(dtype))
    forward = way.startswith("forward")
    expected = [length in (64, 128, 129) and there for length in lengths]
    assert [of_length[0] for of_length in changed] == [one and forward for one in expected]
    if not forward:  # by the stock forward's output
        assert [any(of_length[1:]) for of_length in changed] == expected
