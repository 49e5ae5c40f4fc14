"""Numbers that stand for minus infinity elsewhere, and scales that turn it around: every way of computing
is as near to the definition as the dense form in the same precision."""

import math

import pytest
import torch

from stablemask import sink_attention
from stablemask.backends import native
from tests.marks import native_library
from tests.oracle import assert_no_further_than_twice, doubled, gradients, make_inputs
from tests.rules import BY_TILES

LENGTH = 70
LOWEST = torch.finfo(torch.float32).min
SINKS = [-1e30, -1e32, LOWEST, -math.inf]
PADDING = torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)
PADDING[0, ..., :50] = False
HIDDEN_ROW = torch.rand(2, 4, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.5
HIDDEN_ROW[:, :, 50:55] = False
MASKS = {
    "bool": {"attn_mask": PADDING},
    "additive": {"attn_mask": torch.zeros(PADDING.shape).masked_fill(~PADDING, -math.inf)},
    "rows": {"attn_mask": HIDDEN_ROW},
    "documents": {"attn_mask": PADDING, "documents": torch.arange(LENGTH) // 30},
    "window": {"attn_mask": PADDING, "window": 5, "alibi_slopes": torch.rand(4)},
}


@pytest.fixture(params=["native", "flash", "blocks"])
def attend(request, monkeypatch):
    if request.param == "native" and native.LIBRARY is None:
        pytest.skip(native_library.kwargs["reason"])
    if request.param == "flash":
        monkeypatch.setattr(native, "LIBRARY", None)
    if request.param == "blocks":
        return lambda *inputs, **keywords: sink_attention(*inputs, backend="blocks", **keywords)
    return sink_attention


def compare(attend, inputs, **keywords):
    """Output and every gradient, the sink's included."""
    exact_inputs = doubled(inputs)
    grad = torch.randn(inputs[0].shape[:3] + inputs[2].shape[3:]).to(inputs[0].dtype)

    def differentiated(attend, inputs, **more):
        out = attend(*inputs, **keywords, **more)
        return out, *gradients(out, inputs, grad)

    exact = differentiated(sink_attention, exact_inputs, backend="reference")
    dense = differentiated(sink_attention, inputs, backend="reference")
    ours = differentiated(attend, inputs)
    term = (grad.double() * exact[0]).abs().sum(-1).max()
    assert_no_further_than_twice(ours, dense, exact, term)
    return exact


@pytest.mark.parametrize("sink", SINKS)
@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("q_len", [LENGTH, 31])
def test_a_row_that_sees_nothing_beside_a_sink_of_nothing(attend, masks, sink, q_len):
    masks = dict(MASKS[masks])
    if masks["attn_mask"].shape[2] > 1:
        masks["attn_mask"] = masks["attn_mask"][:, :, -q_len:]
    inputs = make_inputs(2, 4, 2, q_len, LENGTH, 8, torch.float32)
    out = compare(attend, (*inputs, torch.full((4, 1), sink, requires_grad=True)), **masks)[0]
    assert (out == 0).all(-1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e31, 1e37])
@pytest.mark.parametrize("masks", ["bool", "documents", "window"])
def test_a_hidden_key_stays_hidden_whatever_its_score(attend, masks, size, dtype):
    query, key, value = make_inputs(2, 4, 2, LENGTH, LENGTH, 8, dtype)
    with torch.no_grad():
        query.uniform_(0.5, 1.0)
        key[0, :, :50] = size
    assert (query[0] @ key[0, :1].mT).max() > size
    sink = torch.zeros(4, 1, requires_grad=True)
    out = compare(attend, (query, key, value, sink), **MASKS[masks])[0]
    assert not out[0, :, :50].any()


@pytest.mark.parametrize("sink", [0.0, -1e30, -math.inf])
def test_an_additive_mask_is_added(attend, sink):
    """Rows of nothing but the lowest number see their keys, all alike; a sink above it takes them."""
    inputs = make_inputs(2, 4, 2, LENGTH, LENGTH, 8, torch.float32)
    inputs = (*inputs, torch.full((4, 1), sink, requires_grad=True))
    mask = torch.where(HIDDEN_ROW, 0.0, LOWEST)
    out = attend(*inputs, attn_mask=mask)
    exact = sink_attention(*doubled(inputs), attn_mask=mask, backend="reference")
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)
    if sink == -math.inf:
        mean = inputs[2][:, :, :51].mean(2).repeat_interleave(2, 1)
        torch.testing.assert_close(out[:, :, 50], mean, rtol=0, atol=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients(out, inputs, out.detach()))
    lowest = torch.full((1, 1, 1, LENGTH), torch.finfo(torch.float64).min, dtype=torch.float64)
    same = attend(*inputs, attn_mask=lowest[..., :1])
    torch.testing.assert_close(same, attend(*inputs, attn_mask=lowest.clamp(min=LOWEST).float()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("q_len", [LENGTH, 1])
def test_a_number_beyond_the_dtype_takes_nothing_or_all(attend, q_len, dtype):
    inputs = make_inputs(2, 4, 2, q_len, LENGTH, 8, dtype)
    for number in (-1e300, 1e300):
        expected = attend(*inputs, math.copysign(math.inf, number))
        assert torch.equal(attend(*inputs, number), expected)


@pytest.mark.parametrize("scale", [0.0, -0.0, -0.6, 1e-42])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masks", [{}, {"window": 9}, MASKS["bool"]])
@pytest.mark.parametrize("q_len", [LENGTH, 31])
def test_every_scale_is_the_definitions(attend, masks, dtype, scale, q_len, use_rules):
    use_rules(BY_TILES)
    inputs = make_inputs(2, 4, 2, q_len, LENGTH, 32, dtype)
    sink = torch.randn(4, 1, dtype=dtype, requires_grad=True)
    compare(attend, (*inputs, sink), scale=scale, **masks)


def test_a_scale_of_zero_is_the_mean_of_what_is_seen(attend):
    query, key, value = make_inputs(1, 2, 2, LENGTH, LENGTH, 32, torch.float32)
    out = attend(query, key, value, -math.inf, scale=0.0)
    mean = value.cumsum(2) / torch.arange(1, LENGTH + 1).view(-1, 1)
    torch.testing.assert_close(out, mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("sink", "keywords"),
    [
        (LOWEST, MASKS["bool"]),
        (LOWEST, MASKS["window"]),
        (0.0, {"scale": 0.0}),
        (0.0, {"scale": -0.6}),
    ],
)
def test_compiled(sink, keywords):
    inputs = make_inputs(2, 4, 2, LENGTH, LENGTH, 8, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(sink_attention, backend="aot_eager", fullgraph=True)

    compare(compiled, (*inputs, torch.full((4, 1), sink, requires_grad=True)), **keywords)
