"""A cached step of one token: that it takes its short way, and that nothing else does."""

import math

import pytest
import torch

from stablemask import sink_attention, stable_mask_attention
from stablemask.decode import decode_step
from tests.oracle import doubled, make_inputs, sink_definition


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def tensors(dtype=torch.float32, q_len=1, kv_len=19, **kwargs):
    return make_inputs(2, 4, 2, q_len, kv_len, 8, dtype, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["number", "heads", "gamma"])
@pytest.mark.parametrize("layout", ["heads first", "tokens first", "cache view"])
def test_it_is_the_definition(dtype, kind, layout):
    query, key, value = tensors(dtype)
    if layout == "tokens first":
        query, key, value = (
            t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)
        )
    if layout == "cache view":
        cache = torch.randn(2, 2, 2, 50, 8).to(dtype)
        key, value = cache[0, :, :, :19], cache[1, :, :, :19]
    sink = {"number": 0.3, "heads": torch.randn(4, 1), "gamma": None}[kind]
    if kind == "gamma":
        step = decode_step(query, key, value, gamma=0.05)
        public = stable_mask_attention(query, key, value, gamma=0.05)
        general = stable_mask_attention(query, key, value, gamma=0.05, backend="flash")
        sink = -19 * 0.05 - math.log(-math.expm1(-0.05))
    else:
        step = decode_step(query, key, value, sink_logits=sink)
        public = sink_attention(query, key, value, sink)
        general = sink_attention(query, key, value, sink, backend="flash")
    assert step is not None
    assert step.dtype == dtype
    assert torch.equal(step, public)
    logits = torch.as_tensor(sink, dtype=torch.float64)
    exact = sink_definition(*doubled((query, key, value)), logits)
    error = (step.double() - exact).abs().max()
    assert error <= 2 * (general.double() - exact).abs().max() + 4 * torch.finfo(dtype).eps


def test_what_it_leaves_to_the_general_way():
    query, key, value = tensors()
    assert decode_step(query, key, value) is not None
    wide = torch.randn(2, 4, 1, 16)[..., ::2]
    for changed in (
        (wide, key, value),
        (query, key, value[..., :5]),
        (query, key.double(), value),
        (query.expand(2, 4, 1, 8)[:1], key, value),
        (query[:, :3], key, value),
        (query[0], key[0], value[0]),
        (query.to("meta"), key.to("meta"), value.to("meta")),
        (query, key[:, :, :0], value[:, :, :0]),
        (query, key[:, :0], value[:, :0]),
        (query[:0], key[:0], value[:0]),
        (query.long(), key.long(), value.long()),
        tensors(q_len=2),
        (query, key, [1.0]),
    ):
        assert decode_step(*changed) is None
    for keywords in (
        {"gamma": 0.0}, {"gamma": float("nan")}, {"gamma": torch.ones(4)}, {"gamma": 1},
        {"sink_logits": torch.zeros(4)}, {"sink_logits": torch.zeros(2, 1)}, {"sink_logits": 1},
        {"sink_logits": torch.zeros(4, 1, dtype=torch.int64)},
        {"scale": float("nan")}, {"scale": 1},
    ):  # fmt: skip
        assert decode_step(query, key, value, **keywords) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert decode_step(query, key, value) is None
        assert sink_attention(query, key, value, 0.0).dtype == torch.bfloat16
    with torch.enable_grad():
        assert decode_step(query, key, value) is None
    assert torch.func.vmap(lambda q: sink_attention(q, key, value, 0.0))(
        torch.stack([query, query])
    ).shape == (2, 2, 4, 1, 8)


def test_scale_is_used():
    query, key, value = tensors()
    scaled = sink_attention(query, key, value, 0.0, scale=0.7, backend="flash")
    torch.testing.assert_close(sink_attention(query, key, value, 0.0, scale=0.7), scaled)
