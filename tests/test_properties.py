"""Any shape, dtype, mask, mass and backend, drawn by hypothesis: outputs and every gradient.

Held against the dense backend in float64, which ``test_attention.py`` holds against the definition. The
tolerance is derived as there: twice the distance of the dense backend in the same dtype, and four
roundings of the largest term that is summed. ``HYPOTHESIS_PROFILE=nightly`` draws 500 examples.
"""

from unittest import mock

import torch
from hypothesis import given
from hypothesis import strategies as st

from stablemask import (
    head_decay_rates,
    pseudo_logsumexp,
    sink_attention,
    stable_mask_attention,
)
from stablemask.backends import BACKENDS, native
from stablemask.pseudo import log_pseudo_mass
from tests.oracle import (
    assert_no_further_than_twice,
    doubled,
    gradients,
    make_inputs,
    paper_definition,
)

# FlexAttention compiles anew for each structure, and has tests of its own.
NAMES = ["auto", *(name for name in BACKENDS if name in ("flash", "blocks", "reference"))]


def draw_sink(data, batch, heads, past, q_len):
    """Leaves, and a function of them and a dtype that gives sink logits."""
    kind = data.draw(st.sampled_from(["shape", "gamma", "number", "infinite"]), "mass")
    if kind == "gamma":
        horizon = data.draw(st.sampled_from([None, past + q_len, past + q_len + 3]), "horizon")
        positions = torch.arange(past, past + q_len)
        sink = pseudo_logsumexp(positions, torch.rand(heads) + 0.01, horizon).double()
        return (sink.requires_grad_(),), lambda s: s
    if kind == "number":
        number = data.draw(st.floats(-5, 5), "sink")
        return (), lambda: number
    shape = [data.draw(st.sampled_from([1, size])) for size in (batch, heads, q_len)]
    sink = torch.randn(shape[data.draw(st.integers(0, 3), "axes left out") :], dtype=torch.float64)
    if kind == "infinite":
        sink = sink.masked_fill(torch.rand_like(sink) < 0.3, -torch.inf)
        sink = sink.masked_fill(torch.rand_like(sink) < 0.2, torch.inf)
    return (sink.requires_grad_(),), lambda s: s


def draw_masks(data, batch, heads, q_len, kv_len):
    """Keywords, of which the learned ones are leaves."""
    masks = {}
    kind = data.draw(st.sampled_from(["none", "bool", "float", "padding", "learned"]), "attn_mask")
    if kind != "none":
        shape = [data.draw(st.sampled_from([1, size])) for size in (batch, heads, q_len, kv_len)]
        shape = shape[data.draw(st.integers(0, 3), "axes left out") :]
        mask = torch.rand(shape) > 0.3
        if kind == "padding":
            start, stop = (data.draw(st.integers(0, kv_len), name) for name in ("start", "stop"))
            mask = ((torch.arange(kv_len) >= start) & (torch.arange(kv_len) < max(stop, 1))).expand(
                batch, 1, 1, kv_len
            )
        elif kind != "bool":
            mask = torch.randn(shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
            mask = mask.requires_grad_(kind == "learned")
        masks["attn_mask"] = mask
    if data.draw(st.booleans(), "window?"):
        masks["window"] = data.draw(st.integers(1, kv_len + 1), "window")
    if data.draw(st.booleans(), "alibi?"):
        slopes = torch.rand(heads, dtype=torch.float64)
        masks["alibi_slopes"] = slopes.requires_grad_(data.draw(st.booleans(), "learned slopes?"))
    if data.draw(st.booleans(), "documents?"):
        shape = data.draw(st.sampled_from([(kv_len,), (batch, kv_len)]))
        masks["documents"] = torch.randint(0, 3, shape)
        if data.draw(st.booleans(), "sorted?"):
            masks["documents"] = masks["documents"].sort(-1).values
    return masks


@given(data=st.data())
def test_any_call_equals_the_dense_float64(data):
    torch.manual_seed(data.draw(st.integers(0, 999), "seed"))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), "dtype")
    batch, kv_heads, groups = (data.draw(st.integers(1, 3)) for _ in range(3))
    q_len = data.draw(st.one_of(st.integers(1, 20), st.sampled_from([63, 257, 300])), "q_len")
    past = data.draw(st.sampled_from([0, 1, 7, 40]), "past")
    dim, value_dim = (data.draw(st.integers(1, 17)) for _ in range(2))
    heads, kv_len = kv_heads * groups, past + q_len
    inputs = make_inputs(batch, heads, kv_heads, q_len, kv_len, dim, dtype, value_dim)
    sink_leaves, make_sink = draw_sink(data, batch, heads, past, q_len)
    masks = draw_masks(data, batch, heads, q_len, kv_len)
    learned = {k: m for k, m in masks.items() if isinstance(m, torch.Tensor) and m.requires_grad}
    backend = data.draw(st.sampled_from(NAMES if not learned else [*set(NAMES) - {"flash"}]))

    leaves = (*inputs, *sink_leaves, *learned.values())
    grad = torch.randn(batch, heads, q_len, value_dim).to(dtype)

    def attend(leaves, backend):
        leaves = list(leaves)
        query, key, value = leaves[:3]
        sink = make_sink(*leaves[3 : len(leaves) - len(learned)])
        keywords = {**masks, **dict(zip(learned, leaves[len(leaves) - len(learned) :]))}
        out = sink_attention(query, key, value, sink, backend=backend, **keywords)
        assert out.dtype == query.dtype
        return out, *gradients(out, leaves, grad)

    exact = attend(doubled(leaves), "reference")
    if dtype == torch.float64:
        # Sums of up to `terms` numbers of the size of a drawn one, or of the result.
        terms = batch * groups * (q_len + kv_len + dim + value_dim)
        for ours, truth in zip(attend(leaves, backend), exact, strict=True):
            allowed = 4 * terms * torch.finfo(dtype).eps * max(1.0, truth.detach().abs().max())
            torch.testing.assert_close(ours, truth, rtol=0, atol=float(allowed))
        return
    # The gradient of a score is off by roundings of rowsum(grad * out); that of query and key is it
    # times a key or a query.
    term = (grad * exact[0]).abs().sum(-1).max()
    term = term * max(1.0, *(dim**-0.5 * t.detach().abs().max() for t in inputs[:2]))
    assert_no_further_than_twice(attend(leaves, backend), attend(leaves, "reference"), exact, term)


@given(data=st.data())
def test_any_decode_step_equals_the_dense_float64(data):
    """Without gradients, by the stock kernel and, where it was compiled, by ``native``."""
    torch.manual_seed(data.draw(st.integers(0, 999), "seed"))
    dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
    dtype = data.draw(st.sampled_from(dtypes), "dtype")
    batch, kv_heads = (data.draw(st.integers(1, 3)) for _ in range(2))
    groups = data.draw(st.integers(1, 9), "groups")
    kv_len, dim = data.draw(st.integers(1, 600), "kv_len"), data.draw(st.integers(1, 70), "dim")
    heads = kv_heads * groups
    query, key, value = make_inputs(batch, heads, kv_heads, 1, kv_len + 3, dim, dtype)
    start = data.draw(st.integers(0, 3), "start")  # a view into a longer cache
    inputs = query, key[:, :, start:][:, :, :kv_len], value[:, :, start:][:, :, :kv_len]
    scale = data.draw(st.sampled_from([None, 0.3]), "scale")
    gamma = data.draw(st.sampled_from([None, 1e-3, 0.1, 5.0]), "gamma")
    shape = [data.draw(st.sampled_from([1, size])) for size in (batch, heads)]
    sinks = torch.randn(*shape[data.draw(st.integers(0, 1), "axes left out") :], 1)
    sinks = sinks.to(data.draw(st.sampled_from([torch.float32, torch.float64]), "sink dtype"))

    if gamma is not None:
        # In float64 it is the float32 of all rows; else a number.
        sinks = log_pseudo_mass(kv_len - 1, gamma)
        if dtype == torch.float64:
            sinks = torch.tensor(sinks).item()

    def attend(inputs, **keywords):
        if gamma is not None and not keywords:
            return stable_mask_attention(*inputs, gamma=gamma, scale=scale)
        return sink_attention(*inputs, sinks, scale=scale, **keywords)

    with torch.no_grad():
        exact = attend(doubled(inputs), backend="reference")
        dense = attend(inputs, backend="reference")
        for library in {None, native.load()}:
            with mock.patch.object(native, "LIBRARY", library):
                ours = attend(inputs)
            assert ours.dtype == dtype
            if dtype == torch.float64:  # sums of so many numbers of the size of a drawn one
                allowed = 4 * (kv_len + dim) * torch.finfo(dtype).eps
                torch.testing.assert_close(ours, exact, rtol=0, atol=allowed)
            else:
                assert_no_further_than_twice([ours], [dense], [exact], value.abs().max())


@given(data=st.data())
def test_the_published_form_is_its_definition_in_one_pass_and_from_a_cache(data):
    torch.manual_seed(data.draw(st.integers(0, 999), "seed"))
    length, horizon = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 40), "horizon")
    past = data.draw(st.integers(0, length - 1), "past")
    heads = data.draw(st.sampled_from([1, 2, 8]), "heads")
    query, key, value = make_inputs(2, heads, heads // 2 or 1, length, length, 4, torch.float64)
    slopes = head_decay_rates(heads)
    exact = paper_definition(query, key, value, slopes, horizon)

    def rows(start, stop):
        sink = pseudo_logsumexp(torch.arange(start, stop), slopes, horizon, suffix=True)
        inputs = query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop]
        return sink_attention(*inputs, sink)

    # The masses are float32.
    near = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(rows(0, length), exact, **near)
    torch.testing.assert_close(rows(past, length), exact[:, :, past:], **near)
    torch.testing.assert_close(rows(past, past + 1), exact[:, :, past : past + 1], **near)
