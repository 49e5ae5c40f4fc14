"""A sequence on several ranks against the definition of the whole, outputs and every gradient."""

import functools

import pytest
import torch
import torch.distributed as dist

from stablemask import head_decay_rates, sink_attention
from stablemask.distributed import (
    context_parallel_attention,
    context_parallel_stable_mask_attention,
    sequence_positions,
    shard_sequence,
    unshard_sequence,
)
from stablemask.distributed.context_parallel import _Ring
from tests import cuda_contract, marks
from tests.conftest import CARDS
from tests.oracle import gradients, make_inputs, sink_definition
from tests.test_attention import LargestTensor, assert_no_further_than_twice

MASKS = {
    "none": {},
    "window": {"window": 5},
    "alibi": {"alibi_slopes": head_decay_rates(4)},
    "both": {"window": 5, "alibi_slopes": head_decay_rates(4)},
}


def _definition(query, key, value, sink, *, window=None, alibi_slopes=None):
    rows = torch.arange(query.shape[2])
    distance = rows[:, None] - rows
    visible = None if window is None else distance < window
    bias = None
    if alibi_slopes is not None:
        bias = -alibi_slopes[:, None, None].to(query.dtype) * distance
    return sink_definition(query, key, value, sink, visible=visible, bias=bias)


def _sequence_axis(tensor, length):
    """Of query, key and value, and of a sink a row; None for numbers that the ranks share."""
    if tensor.dim() == 4:
        return 2
    return tensor.dim() - 1 if tensor.shape[-1] == length else None


def _whole(tensors, grads, length, layout):
    """Gradients of all ranks as those of one: sequences put together, shared numbers summed."""
    whole = []
    for tensor, grad in zip(tensors, grads, strict=True):
        axis = _sequence_axis(tensor, length)
        if axis is None:
            dist.all_reduce(grad, group=layout["group"])
            whole.append(grad)
        else:
            whole.append(unshard_sequence(grad, axis, **layout))
    return whole


def _compare(inputs, attend, define, layout):
    """As ``tests.test_attention.compare``; the last of inputs may be a learned number per head."""
    exact_inputs = tuple(tensor.detach().double().requires_grad_() for tensor in inputs)
    exact = define(*exact_inputs)
    grad = torch.randn_like(exact).to(inputs[0].dtype)
    truth = (exact, *gradients(exact, exact_inputs, grad))
    dense = define(*inputs)
    dense = (dense, *gradients(dense, inputs, grad))

    length = exact.shape[2]
    shards = []
    for tensor in inputs:
        axis = _sequence_axis(tensor, length)
        shard = tensor if axis is None else shard_sequence(tensor, axis, **layout)
        shards.append(shard.detach().clone().requires_grad_())
    out = attend(*shards)
    grads = gradients(out, tuple(shards), shard_sequence(grad, 2, **layout))
    results = (unshard_sequence(out, 2, **layout), *_whole(inputs, grads, length, layout))
    if inputs[0].dtype == torch.float64:
        for ours, expected in zip(results, truth, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    else:
        term = (grad.double() * exact).abs().sum(-1).max()
        assert_no_further_than_twice(results, dense, truth, term)


def _sinks(dtype, balanced, masks, chunk):
    layout = {"group": None, "balanced": balanced}
    length = chunk * dist.get_world_size() * (2 if balanced else 1)
    for kv_heads, shape in ((2, (4, 1)), (1, (2, 4, length)), (4, (1, 1, length))):
        inputs = make_inputs(2, 4, kv_heads, length, length, 8, dtype)
        sink = torch.randn(shape, dtype=dtype, requires_grad=True)
        _compare(
            (*inputs, sink),
            lambda *shards: context_parallel_attention(*shards, **MASKS[masks], **layout),
            lambda *whole: _definition(*whole, **MASKS[masks]),
            layout,
        )


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(("balanced", "chunk"), [(True, 1), (True, 7), (False, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_two_ranks_equal_the_definition(two_ranks, dtype, balanced, masks, chunk):
    two_ranks.run(_sinks, dtype, balanced, masks, chunk)


def _emulated(capability, *arguments):
    with cuda_contract.emulated(capability) as card:
        _sinks(*arguments)
        assert {name.split()[-1] for name, *_ in card.calls} == {"forward", "backward"}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize(("balanced", "chunk"), [(True, 7), (False, 1)])
@pytest.mark.parametrize(
    ("dtype", "card"),
    [
        (dtype, card)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for card in CARDS
        if (dtype, card) != (torch.bfloat16, "sm75")  # which it has no arithmetic for
    ],
)
def test_two_ranks_on_cuda_emulated(two_ranks, dtype, card, balanced, masks, chunk):
    two_ranks.run(_emulated, CARDS[card], dtype, balanced, masks, chunk)


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize(("dtype", "chunk"), [(torch.float64, 1), (torch.float32, 5)])
def test_four_ranks_equal_the_definition(four_ranks, dtype, balanced, masks, chunk):
    four_ranks.run(_sinks, dtype, balanced, masks, chunk)


def _extremes(scale, sink):
    layout = {"group": None, "balanced": True}
    inputs = make_inputs(2, 4, 2, 12, 12, 8, torch.float64)
    _compare(
        (*inputs, torch.full((4, 1), sink, dtype=torch.float64, requires_grad=True)),
        lambda *shards: context_parallel_attention(*shards, scale=scale, **layout),
        lambda *whole: sink_attention(*whole, scale=scale, backend="reference"),
        layout,
    )


@pytest.mark.parametrize("scale", [0.0, -0.7])
@pytest.mark.parametrize("sink", [-1e32, -torch.inf, torch.inf])
def test_every_scale_and_sinks_that_take_nothing_and_all(two_ranks, scale, sink):
    two_ranks.run(_extremes, scale, sink)


def _stable_mask(horizon, balanced):
    layout = {"group": None, "balanced": balanced}
    inputs = make_inputs(2, 4, 2, 24, 24, 8, torch.float64)
    rates = torch.tensor([0.3, 0.1, 0.03, 0.01], dtype=torch.float64)

    def define(query, key, value, gamma):
        return sink_definition(query, key, value, _log_mass(gamma, horizon))

    exact_inputs = (*inputs, rates.requires_grad_())
    exact = define(*exact_inputs)
    grad = torch.randn_like(exact)
    truth = (exact, *gradients(exact, exact_inputs, grad))
    shards = [shard_sequence(tensor, 2, **layout).detach().requires_grad_() for tensor in inputs]
    shards.append(rates.detach().clone().requires_grad_())
    out = context_parallel_stable_mask_attention(
        *shards[:3], gamma=shards[3], horizon=horizon, **layout
    )
    grads = gradients(out, tuple(shards), shard_sequence(grad, 2, **layout))
    results = (unshard_sequence(out, 2, **layout), *_whole(exact_inputs, grads, 24, layout))
    # The sink logits are float32, of size up to 10.
    for ours, expected in zip(results, truth, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def _log_mass(gamma, horizon):
    """logsumexp of the pseudo scores, one by one, (heads, 24); far enough where there is no end."""
    columns = torch.arange(horizon or 20_000, dtype=torch.float64)
    scores = -gamma[:, None] * columns
    return torch.stack([scores[:, row + 1 :].logsumexp(-1) for row in range(24)], -1)


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("horizon", [None, 30])
def test_learned_gamma_at_global_positions(four_ranks, horizon, balanced):
    four_ranks.run(_stable_mask, horizon, balanced)


def _layouts():
    rank = dist.get_rank()
    whole = torch.arange(24)
    assert shard_sequence(whole, 0).tolist() == [
        *range(3 * rank, 3 * rank + 3), *range(21 - 3 * rank, 24 - 3 * rank)
    ]  # fmt: skip
    assert shard_sequence(whole, 0, balanced=False).tolist() == [*range(6 * rank, 6 * rank + 6)]
    for balanced in (True, False):
        shard = shard_sequence(whole, 0, balanced=balanced)
        assert sequence_positions(6, balanced=balanced).equal(shard)
        table = torch.randn(2, 24, 3).transpose(0, 2)
        part = shard_sequence(table, -2, balanced=balanced)
        assert part.shape == (3, 6, 2)
        assert unshard_sequence(part, -2, balanced=balanced).equal(table)


def test_zigzag_and_contiguous_shards(four_ranks):
    four_ranks.run(_layouts)


@pytest.mark.parametrize(("by_distance", "window"), [(False, None), (True, None), (True, 4)])
@pytest.mark.parametrize("balanced", [True, False])
def test_ranges_cover_what_is_visible_once_and_the_work_is_shared(balanced, by_distance, window):
    size, length = 4, 6
    work = []
    for rank in range(size):
        ring = _Ring(None, rank, size, balanced)
        rows = _places(ring, rank, length)
        work.append(0)
        for source in range(size):
            keys = _places(ring, source, length)
            seen = torch.zeros(length, length, dtype=torch.int64)
            for i, j, past in ring.ranges(source, length, window, by_distance):
                part = torch.ones_like(seen[i, j]).tril(past)
                if by_distance:
                    assert past == rows[i.start] - keys[j.start]
                seen[i, j] += part
                work[-1] += int(part.sum())
            distance = rows[:, None] - keys
            visible = distance >= 0
            if window is None:
                assert seen.equal(visible.long())
            else:  # the kernel hides the rest of a range; one that nobody sees is left out
                assert seen[visible & (distance < window)].eq(1).all()
                assert seen[distance >= window + 2 * length].eq(0).all()
    assert (len(set(work)) == 1) == (balanced and window is None)


def _places(ring, rank, length):
    chunk = length // len(ring.chunks(rank))
    return torch.cat([torch.arange(chunk) + chunk * index for index in ring.chunks(rank)])


def _subgroups():
    """Two rings of two ranks at once, each on its own sequence."""
    groups = [dist.new_group([0, 2]), dist.new_group([3, 1])]
    mine = dist.get_rank() % 2
    layout = {"group": groups[mine], "balanced": True}
    torch.manual_seed(mine)
    inputs = (*make_inputs(1, 4, 2, 12, 12, 8, torch.float64), torch.randn(4, 1).double())
    inputs[3].requires_grad_()
    _compare(
        inputs,
        lambda *shards: context_parallel_attention(*shards, **layout),
        _definition,
        layout,
    )
    with pytest.raises(ValueError, match=r"rank \d, is not in the group"):
        context_parallel_attention(*inputs, group=groups[1 - mine])


def test_rings_of_subgroups(four_ranks):
    four_ranks.run(_subgroups)


def _same_bits_and_special_sinks():
    whole = make_inputs(1, 4, 2, 12, 12, 8, torch.float32)
    shards = [shard_sequence(t, 2).detach().requires_grad_() for t in whole]
    # StableMask's finite horizon ends in -inf; a sink of +inf takes the whole row.
    sink = torch.tensor([[0.5], [-torch.inf], [torch.inf], [-1.0]], requires_grad=True)
    grad = torch.randn(1, 4, 12, 8)
    runs = []
    for _ in range(2):
        out = context_parallel_attention(*shards, sink)
        runs.append((out, *gradients(out, (*shards, sink), shard_sequence(grad, 2))))
    for first, second in zip(*runs):
        assert first.equal(second)
    expected = sink_attention(*whole, sink, backend="reference")
    for ours, truth in zip(runs[0], (expected, *gradients(expected, whole, grad))):
        torch.testing.assert_close(unshard_sequence(ours, 2), truth)
    assert runs[0][4].isfinite().all()
    assert (runs[0][4][1:3] == 0).all()


def test_same_bits_again_and_infinite_sinks(two_ranks):
    two_ranks.run(_same_bits_and_special_sinks)


def _largest_tensor(masks, allowed):
    inputs = make_inputs(1, 4, 2, 1024, 1024, 8, torch.float32)
    with LargestTensor() as largest:
        out = context_parallel_attention(*inputs, 0.0, **MASKS[masks])
        torch.autograd.grad(out, inputs, out.detach())
    assert 0 < largest.elements <= allowed


@pytest.mark.parametrize(
    ("masks", "allowed"),
    # a few rows of head_dim for each token, and with ALiBi the bias of a square on the diagonal
    [("none", 4 * 1024 * 8), ("window", 256 * 512), ("alibi", 4 * 256 * 256)],
)
def test_memory_is_linear_in_length(two_ranks, masks, allowed):
    two_ranks.run(_largest_tensor, masks, allowed)


def _value_dim_and_ways_of_running():
    """value_dim, a number as the sink, checkpointing, autocast, compilation around it."""
    query, key, value = make_inputs(1, 2, 1, 8, 8, 6, torch.float32, value_dim=10)
    parts = [shard_sequence(t, 2).detach().requires_grad_() for t in (query, key, value)]
    expected = sink_attention(query, key, value, 0.0)
    expected_grads = gradients(expected, (query, key, value), expected.detach())
    out = torch.utils.checkpoint.checkpoint(
        context_parallel_attention, *parts, 0.0, use_reentrant=False
    )
    torch.testing.assert_close(unshard_sequence(out, 2), expected)
    for ours, truth in zip(gradients(out, parts, out.detach()), expected_grads):
        torch.testing.assert_close(unshard_sequence(ours, 2), truth)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert context_parallel_attention(*parts, 0.0).dtype == torch.bfloat16
    compiled = torch.compile(context_parallel_attention, backend="eager")
    torch.testing.assert_close(compiled(*parts, 0.0), out)
    squared = context_parallel_attention(*parts, 0.0).square().sum()
    (first,) = torch.autograd.grad(squared, parts[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()


def test_value_dim_and_ways_of_running(two_ranks):
    two_ranks.run(_value_dim_and_ways_of_running)


def _on_gpus(dtype, masks):
    """The shards of each rank on its own device, in a group of NCCL beside that of gloo."""
    device = torch.device("cuda", dist.get_rank())
    torch.cuda.set_device(device)
    layout = {"group": dist.new_group(backend="nccl"), "balanced": True}
    masks = {k: v.to(device) if k == "alibi_slopes" else v for k, v in MASKS[masks].items()}
    sink = torch.randn(4, 1, device=device).requires_grad_()
    inputs = tuple(
        t.detach().to(device).requires_grad_() for t in make_inputs(2, 4, 2, 256, 256, 64, dtype)
    )
    attend = functools.partial(sink_attention, **masks, backend="reference")
    exact_inputs = tuple(t.detach().double().requires_grad_() for t in (*inputs, sink))
    exact, dense = attend(*exact_inputs), attend(*inputs, sink)
    grad = torch.randn_like(dense)
    truth = (exact, *gradients(exact, exact_inputs, grad))
    reference = (dense, *gradients(dense, (*inputs, sink), grad))
    shards = [shard_sequence(t, 2, **layout).detach().requires_grad_() for t in inputs]
    out = context_parallel_attention(*shards, sink, **masks, **layout)
    grads = gradients(out, (*shards, sink), shard_sequence(grad, 2, **layout))
    whole = _whole((*inputs, sink), grads, 256, layout)
    term = (grad.double() * exact).abs().sum(-1).max()
    results = (unshard_sequence(out, 2, **layout), *whole)
    assert_no_further_than_twice(results, reference, truth, term)


class TestTwoGpus:
    pytestmark = marks.two_gpus

    @pytest.mark.parametrize("masks", ["none", "both"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_over_nccl_they_equal_the_definition(self, two_ranks, dtype, masks):
        two_ranks.run(_on_gpus, dtype, masks)


def _bad_input():
    tensor = torch.randn(1, 2, 3, 8)
    for call, message in (
        (
            lambda: context_parallel_attention(tensor, tensor, tensor, 0.0),
            "multiple of 2 for 2 ranks",
        ),
        (lambda: shard_sequence(torch.randn(6), 0), "must be a positive multiple of 4 .* got 6"),
        (lambda: shard_sequence(torch.randn(0), 0), "must be a positive multiple"),
        (
            lambda: context_parallel_attention(tensor[:, :, :2], tensor, tensor, 0.0),
            "shards of one length, got 2 rows and 3 keys",
        ),
        (
            lambda: context_parallel_stable_mask_attention(
                tensor, tensor, tensor, gamma=torch.ones(3), balanced=False
            ),
            r"gamma must be a number or a tensor \(heads,\)",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_what_does_not_fit_is_named(two_ranks):
    two_ranks.run(_bad_input)


def test_without_a_process_group():
    tensor = torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="init_process_group first"):
        context_parallel_attention(tensor, tensor, tensor, 0.0)
    with pytest.raises(ValueError, match="init_process_group first"):
        shard_sequence(tensor, 2)
