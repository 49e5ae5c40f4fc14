"""Who watches a call meets an operator, of the stock kernel or of the compiled library; in eager mode, where nobody
but autograd does, the first gives way to what it is made of, and nobody can tell."""

import functools

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from stablemask import head_decay_rates, sink_attention
from stablemask.backends.stock import operators
from stablemask.masks import Masks
from tests.marks import native_library
from tests.oracle import gradients, make_inputs

KERNEL = "aten::_scaled_dot_product_flash_attention_for_cpu"
PADDING = torch.where(torch.arange(12) < 2, -1e30, 0.0).view(1, 1, 1, 12)
MASKS = {
    "none": Masks(),
    "window": Masks(window=3),
    "alibi": Masks(alibi_slopes=head_decay_rates(4)),
    "documents": Masks(documents=(torch.arange(12) // 5)[None]),
    "padding": Masks(attn_mask=PADDING),
}


@pytest.fixture(params=["flash", pytest.param("native", marks=native_library)])
def backend(request):
    return request.param


@pytest.fixture
def attend(backend):
    return functools.partial(sink_attention, backend=backend)


def inputs_and_sink(dtype=torch.float32):
    return *make_inputs(2, 4, 2, 12, 12, 8, dtype), torch.zeros(4, 1, requires_grad=True)


def operators_called(function):
    with profile(activities=[ProfilerActivity.CPU]) as run:
        function()
    names = [event.name for event in run.events()]
    return [name for name in names if name == KERNEL or name.startswith("stablemask::")]


@pytest.mark.parametrize("q_len", [12, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("masks", MASKS)
def test_the_bits_are_those_of_the_operators(masks, dtype, q_len):
    query, key, value = make_inputs(2, 4, 2, q_len, 12, 8, dtype)
    sink = torch.randn(1, 4, 1, requires_grad=True)
    its = MASKS[masks]
    rest = (its.attn_mask, its.alibi_slopes, its.window, its.documents, 12 - q_len, 0.3, "cpu")
    inputs = (query, key, value, sink)
    both = [f(*inputs, *rest) for f in (operators.eager_forward, operators.flash_forward)]
    grad, grad_lse = torch.randn_like(both[0][0]), torch.randn_like(both[0][1])
    for ours, operator in zip(*both, strict=True):
        assert torch.equal(ours, operator)
        assert ours.stride() == operator.stride()
    for outputs, grads in (((0,), (grad,)), ((0, 1), (grad, grad_lse)), ((1,), (grad_lse,))):
        ours, operator = (
            torch.autograd.grad([found[i] for i in outputs], inputs, grads, retain_graph=True)
            for found in both
        )
        assert all(map(torch.equal, ours, operator))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masks", [{}, {"window": 3}])
def test_no_operator_is_entered_where_nothing_but_autograd_watches(masks, training):
    def run():
        with torch.set_grad_enabled(training):
            out = sink_attention(*inputs, **masks, backend="flash")
        if training:
            out.sum().backward()

    inputs = inputs_and_sink()
    assert set(operators_called(run)) == {KERNEL}


class Record(TorchDispatchMode):
    """Notes the name of every operator that is called."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


def test_a_mode_sees_the_operators(attend, backend):
    inputs, seen = inputs_and_sink(), []
    expected = attend(*inputs)
    with Record(seen):
        out = attend(*inputs)
        out.sum().backward()
    assert torch.equal(out, expected)
    assert seen.count(f"stablemask::{backend}_forward") == 1
    assert seen.count(f"stablemask::{backend}_backward") == 1


def test_a_mode_around_the_backward_alone_sees_its_operator(attend, backend):
    inputs, seen = inputs_and_sink(), []
    out = attend(*inputs)
    with Record(seen):
        out.sum().backward()
    assert seen.count(f"stablemask::{backend}_backward") == 1


def test_a_batch_of_gradients_is_that_of_each(attend):
    inputs = inputs_and_sink()
    out = attend(*inputs)
    grads = torch.randn(3, *out.shape)
    batch = torch.autograd.grad(out, inputs, grads, is_grads_batched=True, retain_graph=True)
    for number, grad in enumerate(grads):
        alone = torch.autograd.grad(out, inputs, grad, retain_graph=True)
        for ours, expected in zip(batch, alone, strict=True):
            torch.testing.assert_close(ours[number], expected)


def test_compiled_autograd_traces_the_operator(attend, backend):
    torch.compiler.reset()
    inputs, graphs = inputs_and_sink(), []

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiler = torch.compile(backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    out = attend(*inputs)
    expected = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    with torch._dynamo.compiled_autograd._enable(compiler):
        out.sum().backward()
    assert all(torch.equal(t.grad, grad) for t, grad in zip(inputs, expected, strict=True))
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert f"stablemask.{backend}_backward" in " ".join(called)


def test_selective_checkpointing_keeps_what_the_operator_returns(attend, backend):
    forward = getattr(torch.ops.stablemask, f"{backend}_forward").default

    def policy(context, function, *args, **kwargs):
        kept = function is forward
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    def run(inputs, **options):
        out = checkpoint(attend, *inputs, use_reentrant=False, **options)
        return gradients(out, inputs, torch.ones_like(out))

    inputs = inputs_and_sink()
    expected = run(inputs)

    def selective():
        contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
        assert all(map(torch.equal, run(inputs, context_fn=contexts), expected))

    assert operators_called(lambda: run(inputs)).count(KERNEL) == 2
    assert operators_called(selective).count(KERNEL) == 1


def test_the_output_can_be_written_into_as_that_of_any_operator(attend):
    inputs = inputs_and_sink()
    out = attend(*inputs)
    doubled = 2 * out.detach()
    assert not out._is_view()
    out.mul_(2)
    assert torch.equal(out, doubled)
    # It was kept for the backward, as the stock function keeps its own.
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_saved_tensors_pass_through_hooks(attend):
    inputs, packed = inputs_and_sink(), []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.clone()

    expected = gradients(attend(*inputs), inputs, torch.ones(2, 4, 12, 8))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = attend(*inputs)
    assert torch.Size((2, 4, 12)) in packed  # the logsumexp
    assert all(map(torch.equal, gradients(out, inputs, torch.ones_like(out)), expected))
