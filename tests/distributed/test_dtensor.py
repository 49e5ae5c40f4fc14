"""The attention on DTensors against the same call on whole tensors."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from stablemask import sink_attention, stable_mask_attention
from tests.oracle import make_inputs

TOLERANCE = {"rtol": 0, "atol": 1e-11}  # float64, and the same float32 sink logits in both


def _compare(mesh, placements, attend, inputs, tensors=None, options=None, sharded=()):
    """Outputs and the gradient of every leaf, of DTensors and of whole tensors."""
    tensors, options = tensors or {}, options or {}
    expected = attend(*inputs, **tensors, **options)
    grad = torch.randn(expected.shape, dtype=expected.dtype)
    leaves = [*inputs, *(t for t in tensors.values() if t.requires_grad)]
    expected_grads = torch.autograd.grad(expected, leaves, grad)

    def place(tensor, to):
        placed = distribute_tensor(tensor.detach(), mesh, to)
        return placed.requires_grad_(tensor.requires_grad)

    key_placements = [
        Replicate() if p == Shard(1) and inputs[1].shape[1] % mesh.size(dim) else p
        for dim, p in enumerate(placements)
    ]
    ours = [place(inputs[0], placements), *(place(t, key_placements) for t in inputs[1:])]
    named = {
        name: place(tensor, dict(sharded)[name]) if name in dict(sharded)
        else tensor.detach().requires_grad_(tensor.requires_grad)
        for name, tensor in tensors.items()
    }  # fmt: skip
    out = attend(*ours, **named, **options)
    assert isinstance(out, DTensor)
    assert out.placements == tuple(placements)
    assert out.shape == expected.shape
    torch.testing.assert_close(out.full_tensor(), expected, **TOLERANCE)
    leaves = [*ours, *(t for t in named.values() if t.requires_grad)]
    grads = torch.autograd.grad(out, leaves, distribute_tensor(grad, mesh, placements))
    for got, want in zip(grads, expected_grads):
        whole = got.full_tensor() if isinstance(got, DTensor) else got
        torch.testing.assert_close(whole, want, **TOLERANCE)


PLACEMENTS = {"heads": Shard(1), "batch": Shard(0), "replicated": Replicate()}


def _learned_sink(layout, kv_heads, shard_the_sink):
    mesh = init_device_mesh("cpu", (2,))
    inputs = make_inputs(2, 4, kv_heads, 7, 11, 8, torch.float64)
    sink = torch.randn(4, 1, dtype=torch.float64, requires_grad=True)
    sharded = {"sink_logits": [Shard(0)]} if shard_the_sink else {}
    placements = [PLACEMENTS[layout]]
    _compare(mesh, placements, sink_attention, inputs, {"sink_logits": sink}, sharded=sharded)


@pytest.mark.parametrize("shard_the_sink", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("layout", PLACEMENTS)
def test_learned_sink(two_ranks, layout, kv_heads, shard_the_sink):
    two_ranks.run(_learned_sink, layout, kv_heads, shard_the_sink)


def _learned_gamma(layout, shard_gamma, backend):
    mesh = init_device_mesh("cpu", (2,))
    inputs = make_inputs(2, 4, 2, 9, 9, 8, torch.float64)
    gamma = torch.tensor([0.3, 0.1, 0.03, 0.01], dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([3, 0])[:, None] + torch.arange(9)
    sharded = {"gamma": [Shard(0)]} if shard_gamma else {}
    _compare(
        mesh, [PLACEMENTS[layout]], stable_mask_attention, inputs,
        {"gamma": gamma, "positions": positions}, {"backend": backend}, sharded,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("shard_gamma", [True, False])
@pytest.mark.parametrize("layout", PLACEMENTS)
def test_learned_gamma_follows_its_head(two_ranks, layout, shard_gamma, backend):
    two_ranks.run(_learned_gamma, layout, shard_gamma, backend)


def _masks(layout):
    mesh = init_device_mesh("cpu", (2,))
    inputs = make_inputs(2, 4, 2, 6, 9, 8, torch.float64)
    tensors = {
        "sink_logits": torch.randn(2, 1, 6, dtype=torch.float64, requires_grad=True),
        "attn_mask": torch.rand(2, 1, 1, 9) > 0.2,
        "alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625]),
        "documents": torch.arange(9).expand(2, 9) // 5,
    }
    _compare(
        mesh, [PLACEMENTS[layout]], sink_attention, inputs, tensors, {"window": 4, "scale": 0.3}
    )
    tensors = {
        "sink_logits": torch.zeros(()),
        "attn_mask": torch.randn(4, 6, 9, dtype=torch.float64, requires_grad=True),
        "alibi_slopes": torch.rand(4, dtype=torch.float64).requires_grad_(),
    }
    sharded = {"attn_mask": [Shard(0)] if layout == "heads" else [Replicate()]}
    _compare(mesh, [PLACEMENTS[layout]], sink_attention, inputs, tensors, sharded=sharded)


@pytest.mark.parametrize("layout", PLACEMENTS)
def test_masks_follow_the_query(two_ranks, layout):
    two_ranks.run(_masks, layout)


def _two_dimensions():
    mesh = init_device_mesh("cpu", (2, 2))
    sink = torch.randn(8, 1, dtype=torch.float64, requires_grad=True)
    for kv_heads in (4, 2):
        inputs = make_inputs(2, 8, kv_heads, 5, 5, 8, torch.float64)
        tensors = {"sink_logits": sink}
        _compare(mesh, [Shard(0), Shard(1)], sink_attention, inputs, tensors)
        sharded = {"sink_logits": [Replicate(), Shard(0)]}
        _compare(mesh, [Shard(0), Shard(1)], sink_attention, inputs, tensors, sharded=sharded)
        _compare(mesh, [Shard(1), Shard(1)], sink_attention, inputs, tensors)
        _compare(mesh, [Replicate(), Shard(1)], sink_attention, inputs, tensors)


def test_a_mesh_of_two_dimensions(four_ranks):
    four_ranks.run(_two_dimensions)


def _compiled():
    mesh = init_device_mesh("cpu", (2,))
    inputs = make_inputs(1, 4, 2, 8, 8, 8, torch.float32)
    shards = [distribute_tensor(t.detach(), mesh, [Shard(1)]) for t in inputs]
    sinks = torch.randn(4, 1)
    compiled = torch.compile(sink_attention, backend="aot_eager", fullgraph=True)
    out = compiled(*shards, sink_logits=sinks)
    torch.testing.assert_close(out.full_tensor(), sink_attention(*inputs, sinks))


def test_compiled_without_a_graph_break(two_ranks):
    two_ranks.run(_compiled)


def _errors():
    mesh = init_device_mesh("cpu", (2,))

    def place(heads, placement, length=4):
        return distribute_tensor(torch.randn(2, heads, length, 8), mesh, [placement])

    query = place(4, Shard(1))
    for inputs, error, message in (
        ((place(4, Shard(2)),) * 3, ValueError, "context_parallel_attention"),
        (
            (place(3, Shard(1)),) * 3,
            ValueError,
            r"heads must be a multiple of the 2 ranks .* got 3",
        ),
        (
            (place(6, Shard(1)), *(place(3, Replicate()),) * 2),
            ValueError,
            "kv_heads must be a mult",
        ),
        ((query, query.full_tensor(), query), TypeError, "key is Tensor"),
    ):
        with pytest.raises(error, match=message):
            sink_attention(*inputs, sink_logits=0.0)
    partial = DTensor.from_local(torch.randn(2, 4, 4, 8), mesh, [Partial()])
    with pytest.raises(ValueError, match="query must be Shard"):
        sink_attention(partial, partial, partial, sink_logits=0.0)
    with pytest.raises(ValueError, match=r"sink_logits must have heads = 4 or 1 .*\(5, 1\)"):
        sink_attention(query, query, query, sink_logits=torch.zeros(5, 1))
    pair = place(2, Replicate())
    with pytest.raises(ValueError, match="enable_gqa must be True for 4 query heads on 2 key"):
        sink_attention(query, pair, pair, sink_logits=0.0, enable_gqa=False)
    other = init_device_mesh("cpu", (1, 2))
    sink = distribute_tensor(torch.zeros(4, 1), other, [Replicate(), Shard(0)])
    with pytest.raises(ValueError, match="sink_logits must be on the mesh of query"):
        sink_attention(query, query, query, sink_logits=sink)


def test_what_does_not_fit_is_named(two_ranks):
    two_ranks.run(_errors)
