"""Attention a range of keys at a time, against one pass and against the definition."""

import itertools

import pytest
import torch

from stablemask import (
    head_decay_rates,
    merge_attention,
    partial_attention,
    pseudo_logsumexp,
    sink_attention,
    stable_mask_attention,
)
from tests.oracle import gradients, make_inputs, sink_definition


def in_chunks(query, key, value, sink, sizes, **masks):
    """Chunked prefill: each chunk of queries over each chunk of keys up to its own."""
    starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    chunks = [slice(a, b) for a, b in itertools.pairwise(starts)]
    outs = []
    for rows in chunks:
        parts = [
            partial_attention(
                query[:, :, rows], key[:, :, keys], value[:, :, keys],
                past=rows.start - keys.start, **masks,
            )
            for keys in chunks if keys.start <= rows.start
        ]  # fmt: skip
        sink_rows = sink if sink.shape[-1] == 1 else sink[..., rows]
        outs.append(merge_attention(parts, sink_rows)[0])
    return torch.cat(outs, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[19], [7, 12], [12, 7], [1, 1, 17], [5, 5, 5, 4]])
@pytest.mark.parametrize("masks", ["none", "window", "alibi", "both"])
def test_chunks_equal_one_pass_in_output_and_every_gradient(dtype, sizes, masks):
    keywords = {
        "none": {},
        "window": {"window": 6},
        "alibi": {"alibi_slopes": head_decay_rates(4)},
        "both": {"window": 6, "alibi_slopes": head_decay_rates(4)},
    }[masks]
    inputs = make_inputs(2, 4, 2, 19, 19, 8, dtype, value_dim=5)
    sink = torch.randn(4, 19, dtype=torch.float64).to(dtype).requires_grad_()
    exact_inputs = tuple(t.detach().double().requires_grad_() for t in (*inputs, sink))
    out = in_chunks(*inputs, sink, sizes, **keywords)
    exact = sink_attention(*exact_inputs, **keywords, backend="reference")
    grad = torch.randn_like(exact).to(dtype)
    results = (out, *gradients(out, (*inputs, sink), grad))
    truth = (exact, *gradients(exact, exact_inputs, grad))
    # One rounding of each tensor a chunk passes on, of which a row has at most as many as there are.
    eps = torch.finfo(dtype).eps
    for ours, expected in zip(results, truth, strict=True):
        assert ours.dtype == dtype
        bound = 4 * (len(sizes) + 1) * max(eps, 2e-16) * expected.abs().max()
        assert (ours.double() - expected).abs().max() <= max(bound, 1e-13)


def test_a_part_is_softmax_and_its_logsumexp():
    query, key, value = make_inputs(1, 2, 1, 4, 9, 8, torch.float64)
    out, lse = partial_attention(query, key, value, past=9)  # all nine keys are in the past
    scores = query @ key.transpose(-2, -1) * 8**-0.5
    torch.testing.assert_close(out, scores.softmax(-1) @ value.expand_as(key))
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    # Both results at once, each with a gradient of its own.
    grads = torch.randn_like(out), torch.randn_like(lse)
    ours = torch.autograd.grad((out, lse), (query, key, value), grads)
    expected = torch.autograd.grad(
        (scores.softmax(-1) @ value, scores.logsumexp(-1)), (query, key, value), grads
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_gradient_of_lse_alone():
    query, key, value = make_inputs(1, 2, 2, 5, 5, 8, torch.float64)
    _, lse = partial_attention(query, key, value, past=0)
    scores = (query @ key.transpose(-2, -1) * 8**-0.5).masked_fill(
        torch.ones(5, 5, dtype=torch.bool).triu(1), -torch.inf
    )
    grad = torch.randn_like(lse)
    for a, b in zip(
        torch.autograd.grad(lse, (query, key), grad),
        torch.autograd.grad(scores.logsumexp(-1), (query, key), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_merged_parts_are_a_part_again():
    query, key, value = make_inputs(2, 4, 4, 3, 12, 8, torch.float64)
    sink = torch.randn(4, 1, dtype=torch.float64, requires_grad=True)
    ranges = [slice(0, 4), slice(4, 9), slice(9, 12)]
    parts = [
        partial_attention(query, key[:, :, r], value[:, :, r], past=9 - r.start) for r in ranges
    ]
    out, lse = merge_attention([merge_attention(parts[:2]), parts[2]], sink)
    torch.testing.assert_close(out, sink_definition(query, key, value, sink))
    whole, whole_lse = merge_attention(parts, sink)
    torch.testing.assert_close(lse, whole_lse)
    torch.testing.assert_close(out, whole)


@pytest.mark.parametrize("sink", [None, -torch.inf, torch.inf, 0.0, -1e30, -1e32, 1e32])
def test_rows_that_see_nothing_and_infinite_sinks(sink):
    query, key, value = make_inputs(1, 2, 2, 6, 6, 8, torch.float64)
    visible = torch.ones(6, 6, dtype=torch.bool).tril()
    visible[:, :3] = False  # as left padding: rows 0, 1, 2 see nothing
    sinks = None if sink is None else torch.full((2, 1), sink, requires_grad=True)
    halves = [slice(0, 3), slice(3, 6)]
    parts = [
        partial_attention(
            query[:, :, 3:],
            key[:, :, r],
            value[:, :, r],
            past=3 - r.start,
            attn_mask=visible[3:, r],
        )
        for r in halves
    ]
    assert (parts[0][1] == -torch.inf).all()
    assert (parts[0][0] == 0).all()
    out, lse = merge_attention(parts, sinks)
    assert sink is None or (lse[:, :, 0] >= sink).all()
    expected = sink_attention(
        query, key, value, -torch.inf if sink is None else sink, attn_mask=visible
    )[:, :, 3:]
    torch.testing.assert_close(out, expected)
    leaves = (query, key, value) if sinks is None else (query, key, value, sinks)
    assert all(g.isfinite().all() for g in gradients(out, leaves, torch.randn_like(out)))
    blind, lse = merge_attention([parts[0], parts[0]])
    assert (blind == 0).all()
    assert (lse == -torch.inf).all()


def test_window_that_has_left_a_range_behind():
    query, key, value = make_inputs(1, 2, 2, 4, 4, 8, torch.float32)
    out, lse = partial_attention(query, key, value, past=50, window=8)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    assert all((g == 0).all() for g in gradients(out, (query, key, value), torch.ones_like(out)))


def test_prefill_in_chunks_equals_stable_mask_attention():
    query, key, value = make_inputs(1, 4, 2, 19, 19, 8, torch.float64)
    out = in_chunks(query, key, value, pseudo_logsumexp(torch.arange(19), 0.1), [8, 8, 3])
    torch.testing.assert_close(out, stable_mask_attention(query, key, value, gamma=0.1))


@pytest.mark.parametrize("scale", [0.0, -0.7])
def test_every_scale_is_the_definitions(scale):
    inputs = make_inputs(2, 4, 2, 19, 19, 8, torch.float64)
    sink = torch.randn(4, 1, dtype=torch.float64, requires_grad=True)
    out = in_chunks(*inputs, sink, [7, 12], scale=scale)
    exact = sink_attention(*inputs, sink, scale=scale, backend="reference")
    grad = torch.randn_like(out)
    found, truth = (gradients(each, (*inputs, sink), grad) for each in (out, exact))
    for ours, expected in zip((out, *found), (exact, *truth), strict=True):
        torch.testing.assert_close(ours, expected)


def test_an_infinite_sink_takes_all_of_any_logsumexp():
    out, lse = torch.ones(1, 1, 1, 8), torch.full((1, 1, 1), 1e32)
    merged, total = merge_attention([(out, lse)], torch.inf)
    assert not merged.any()
    assert (total == torch.inf).all()
    again, total = merge_attention([(merged, total), (out, lse)])
    assert not again.any()
    assert (total == torch.inf).all()


@pytest.mark.parametrize("past", [-1, 3, 5, 10**30])
def test_rows_stand_in_the_range_or_behind_it(past):
    query, key, value = make_inputs(1, 2, 2, 4, 6, 8, torch.float32)
    with pytest.raises(ValueError, match="past must be"):
        partial_attention(query, key, value, past=past)
    with pytest.raises(TypeError, match="past must be an int"):
        partial_attention(query, key, value, past=float(past))


def test_parts_that_do_not_fit_are_named():
    query, key, value = make_inputs(1, 2, 2, 4, 4, 8, torch.float32)
    out, lse = partial_attention(query, key, value, past=0)
    with pytest.raises(ValueError, match="parts must hold"):
        merge_attention([])
    with pytest.raises(TypeError, match="parts must be pairs"):
        merge_attention((out, lse))
    with pytest.raises(TypeError, match=r"floating-point tensors, got torch\.int64"):
        merge_attention([(out, lse), (out.long(), lse)])
    with pytest.raises(TypeError, match="floating-point tensors, got float"):
        merge_attention([(out, 0.0)])
    with pytest.raises(ValueError, match="each part must be"):
        merge_attention([(out, lse), (out[:, :, :3], lse)])
    with pytest.raises(ValueError, match="sink_logits"):
        merge_attention([(out, lse)], torch.zeros(3))
