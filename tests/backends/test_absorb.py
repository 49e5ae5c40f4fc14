"""A sink's share taken out of an output in one pass, against what it means, in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stablemask import native, sink_attention
from stablemask.backends import operators
from tests.marks import native_library
from tests.oracle import doubled, gradients, make_inputs, sink_definition

pytestmark = native_library


def absorbed(out, lse, sink):
    """What ``absorb`` computes, in float64."""
    lse, sink = lse.double(), sink.double()
    return out.double() * torch.sigmoid(lse - sink).unsqueeze(-1), torch.logaddexp(lse, sink)


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 5),
    length=st.sampled_from([1, 7, 16, 63, 64, 65, 200]),
    head_dim=st.integers(1, 70),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(["tokens first", "heads first", "cut"]),
    shared=st.tuples(*[st.booleans()] * 3),
    size=st.sampled_from([3, 300]),
    seed=st.integers(0, 99),
)
def test_every_shape(batch, heads, length, head_dim, dtype, layout, shared, size, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    out = normal(batch, heads, length, head_dim).to(dtype)
    if layout == "tokens first":
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "cut":
        out = normal(batch, heads, length, head_dim + 3).to(dtype)[..., :head_dim]
    precise = torch.promote_types(dtype, torch.float32)
    lse = 3 * normal(batch, length, heads).to(precise).transpose(1, 2)
    sizes = (1 if is_one else axis for is_one, axis in zip(shared, (batch, heads, length)))
    sink = size * normal(*sizes).to(precise)
    exact_out, exact_total = absorbed(out, lse, sink)
    total = native.LIBRARY.absorb(out, lse, sink)
    assert total.dtype == precise
    assert total.is_contiguous()
    eps = torch.finfo(precise).eps
    torch.testing.assert_close(total.double(), exact_total, rtol=4 * eps, atol=8 * eps)
    # The factor is the exponential of a difference, which is rounded first.
    rounding = torch.finfo(dtype).eps / 2 + eps * (16 + (lse - sink).abs().max().item())
    tiny = torch.finfo(dtype).smallest_normal  # float16 has few numbers below it
    torch.testing.assert_close(out.double(), exact_out, rtol=rounding, atol=tiny)


def test_sinks_that_take_nothing_and_all():
    out, lse = torch.randn(1, 3, 5, 8), torch.randn(1, 3, 5)
    before = out.clone()
    sink = torch.tensor([-math.inf, math.inf, 0.0]).reshape(1, 3, 1)
    total = native.LIBRARY.absorb(out, lse, sink)
    assert torch.equal(out[:, 0], before[:, 0])
    assert torch.equal(total[:, 0], lse[:, 0])
    assert not out[:, 1].any()
    assert (total[:, 1] == math.inf).all()


def test_what_it_leaves_alone():
    out, lse, sink = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5), torch.zeros(1, 1, 1)
    absorb = native.LIBRARY.absorb
    for changed in (
        (out.transpose(2, 3), lse, sink),
        (out, lse.double(), sink),
        (out.bfloat16(), lse.bfloat16(), sink),
        (out, lse, sink.double()),
        (out, lse, sink[0]),
        (out, lse, torch.zeros(2, 2, 1)),
        (out, lse[:1], sink),
        (out, lse, 0.0),
        (out.to("meta"), lse, sink),
        (out.to_sparse(), lse, sink),
    ):
        assert absorb(*changed) is None
    with pytest.raises(TypeError):
        absorb(out, lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("q_len", [70, 30])
def test_with_and_without_it_outputs_and_gradients_agree(dtype, q_len, monkeypatch):
    inputs = make_inputs(2, 4, 2, q_len, 70, 16, dtype)
    sinks = torch.randn(4, 1, requires_grad=True)
    grad = torch.randn(2, 4, q_len, 16).to(dtype)

    def attend():
        out = sink_attention(*inputs, sinks, backend="flash")
        return out, *gradients(out, (*inputs, sinks), grad)

    compiled = attend()
    monkeypatch.setattr(operators, "LIBRARY", None)
    exact = sink_definition(*doubled(inputs), sinks.double())
    for one, other in zip(compiled, attend()):
        bound = 8 * torch.finfo(dtype).eps * other.double().abs().max()
        assert (one.double() - other.double()).abs().max() <= bound
    assert (compiled[0].double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps
