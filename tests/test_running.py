"""Every way in which PyTorch runs code: compiled, exported, under autocast, checkpointed."""

import functools

import pytest
import torch
from torch.func import grad, vmap
from torch.utils.checkpoint import checkpoint

from stablemask import head_decay_rates, sink_attention, stable_mask_attention
from tests.oracle import gradients, make_inputs


@pytest.mark.parametrize("sample", ["square", "cache", "padding", "learned", "blocks"])
def test_opcheck(sample):
    from stablemask.backends.stock.operators import flash_backward, flash_forward

    q_len, kv_len = (5, 9) if sample == "cache" else (9, 9)
    query, key, value = make_inputs(2, 4, 2, q_len, kv_len, 8, torch.float32)
    sink = torch.zeros(1, 4, 1, requires_grad=sample == "learned")
    bias = None
    if sample == "padding":
        bias = torch.zeros(2, 1, 1, kv_len)
        bias[0, ..., :3] = -1e30
    window, slopes = (3, head_decay_rates(4)) if sample == "blocks" else (None, None)
    documents = torch.arange(kv_len)[None] // 4 if sample == "blocks" else None
    rest = (bias, slopes, window, documents, kv_len - q_len, 0.3, "cpu")
    torch.library.opcheck(flash_forward, (query, key, value, sink, *rest))
    out, lse = (t.detach() for t in flash_forward(query, key, value, sink, *rest))
    tensors = tuple(t.detach() for t in (query, key, value))
    torch.library.opcheck(flash_backward, (torch.randn_like(out), *tensors, out, lse, *rest))


def assert_equals_eager(compiled, attend, inputs):
    out, expected = compiled(*inputs), attend(*inputs)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for ours, eager in zip(
        gradients(out, inputs, grad), gradients(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("case", ["plain", "cache", "padding", "slopes"])
def test_compiles_without_a_graph_break(case):
    q_len, kv_len = (5, 9) if case == "cache" else (9, 9)
    inputs = make_inputs(2, 4, 2, q_len, kv_len, 8, torch.float32)
    mask = (torch.arange(kv_len) >= 2).view(1, 1, 1, -1) if case == "padding" else None
    gamma = head_decay_rates(4) if case == "slopes" else 0.1

    def attend(query, key, value):
        return stable_mask_attention(query, key, value, gamma=gamma, attn_mask=mask)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert_equals_eager(compiled, attend, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_inference_leaves_the_factor_to_the_compiler(dtype):
    inputs = [t.detach() for t in make_inputs(2, 4, 2, 16, 16, 8, dtype, value_dim=5)]
    torch._dynamo.reset()
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    attend = functools.partial(stable_mask_attention, gamma=0.1, backend="flash")
    compiled = torch.compile(lambda q, k, v: attend(q, k, v), fullgraph=True, backend=keep)
    step = (inputs[0][:, :, -1:], *inputs[1:])
    for tensors in (inputs, step):
        torch.testing.assert_close(compiled(*tensors), attend(*tensors))
    assert len(graphs) == 2
    for graph in graphs:
        called = [str(node.target) for node in graph.graph.nodes]
        assert any("flash_attention_for_cpu" in name for name in called)
        assert not any("stablemask" in name for name in called)


@pytest.mark.parametrize("case", ["plain", "learned", "finite", "masks"])
def test_one_graph_serves_every_length(case):
    gamma = torch.full((4,), 0.1, requires_grad=True) if case == "learned" else 0.1
    slopes = head_decay_rates(4)

    def attend(query, key, value):
        length = key.shape[2]
        masks = {}
        if case == "masks":
            visible = torch.arange(length) > 1
            documents = torch.arange(length) // 7
            masks = {
                "window": 5, "alibi_slopes": slopes, "documents": documents, "attn_mask": visible,
            }  # fmt: skip
        horizon = length if case == "finite" else None
        return stable_mask_attention(query, key, value, gamma=gamma, horizon=horizon, **masks)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (9, 17, 33, 300):
        inputs = make_inputs(2, 4, 2, length, length, 8, torch.float32)
        with torch._dynamo.config.patch(error_on_recompile=length > 9):
            assert_equals_eager(compiled, attend, inputs)


def test_one_graph_serves_every_length_without_gradients():
    def attend(query, key, value):
        return stable_mask_attention(query, key, value, gamma=0.1)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (9, 17, 300):
        inputs = [t.detach() for t in make_inputs(2, 4, 2, length, length, 8, torch.float32)]
        with torch._dynamo.config.patch(error_on_recompile=length > 9):
            torch.testing.assert_close(compiled(*inputs), attend(*inputs))


@pytest.mark.parametrize(
    ("graphs", "attend", "changing"),
    [
        (1, lambda q, k, v, x: sink_attention(q, k, v, x), [0.3, -1.0, 0.0, 2.0]),
        (1, lambda q, k, v, x: sink_attention(q, k, v, x), [2, -3, 4]),
        (1, lambda q, k, v, x: stable_mask_attention(q, k, v, gamma=x), [0.3, 0.1, 0.02]),
        (1, lambda q, k, v, x: stable_mask_attention(q, k, v, gamma=0.1, horizon=x), [9, 30, 12]),
        (1, lambda q, k, v, x: sink_attention(q, k, v, 0.0, window=x), [3, 5, 2]),
        (1, lambda q, k, v, x: sink_attention(q, k, v, 0.0, scale=x, backend="blocks"), [0.3, -2.0, 1.0]),
        # The stock attention too takes a scale for a constant.
        (3, lambda q, k, v, x: sink_attention(q, k, v, 0.0, scale=x), [0.3, 0.2, 1.0]),
    ],
    ids=["sink", "integral sink", "gamma", "horizon", "window", "scale", "scale of a kernel"],
)  # fmt: skip
def test_numbers_may_change_between_compiled_calls(attend, changing, graphs):
    torch._dynamo.reset()
    seen = []

    def count(graph, _):
        seen.append(graph)
        return graph

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=count)
    for length, number in enumerate(changing, start=7):
        inputs = [t.detach() for t in make_inputs(2, 4, 2, length, length, 8, torch.float32)]
        torch.testing.assert_close(compiled(*inputs, number), attend(*inputs, number))
    assert len(seen) <= graphs


@pytest.mark.parametrize("in_graph", [True, False], ids=["input", "closure"])
def test_parameters_keep_their_sizes_where_lengths_are_symbols(in_graph):
    """The compiler takes the size of a parameter for a constant, and that of an input for a symbol."""
    sinks = torch.nn.Parameter(torch.randn(4, 1))
    gamma = torch.nn.Parameter(head_decay_rates(4))

    def attend(query, key, value, sinks=sinks, gamma=gamma):
        length = key.shape[2]
        mass = stable_mask_attention(
            query,
            key,
            value,
            gamma=gamma,
            positions=torch.arange(length),
            alibi_slopes=gamma.detach(),
        )
        return mass + sink_attention(
            query, key, value, sinks, attn_mask=torch.ones(length).bool(), documents=torch.arange(length) // 4
        )  # fmt: skip

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (7, 12):
        inputs = make_inputs(2, 4, 2, length, length, 8, torch.float32)
        if in_graph:
            assert_equals_eager(compiled, attend, (*inputs, sinks, gamma))
            continue
        with torch._dynamo.config.patch(error_on_recompile=length > 7):
            assert_equals_eager(compiled, attend, inputs)


def test_shapes_alone_are_enough():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        query, key, value = make_inputs(2, 4, 2, 9, 9, 8, torch.float32, value_dim=5)
        out = stable_mask_attention(query, key, value, gamma=head_decay_rates(4))
        assert out.shape == (2, 4, 9, 5)


def test_compiles_with_inductor():
    inputs = make_inputs(1, 2, 2, 16, 16, 8, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v: stable_mask_attention(q, k, v, gamma=0.1) * 2, fullgraph=True
    )
    expected = stable_mask_attention(*inputs, gamma=0.1) * 2
    torch.testing.assert_close(compiled(*inputs), expected)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("masks", [{}, {"window": 5}])
def test_exports(dynamic, masks):
    class Module(torch.nn.Module):
        def forward(self, query, key, value):
            return stable_mask_attention(query, key, value, gamma=0.1, **masks)

    def inputs(length):
        return tuple(t.detach() for t in make_inputs(1, 2, 2, length, length, 8, torch.float32))

    shapes = [{2: torch.export.Dim("length", min=2, max=512)}] * 3 if dynamic else None
    program = torch.export.export(Module(), inputs(16), dynamic_shapes=shapes)
    for length in (16, 33, 300) if dynamic else (16,):
        tensors = inputs(length)
        torch.testing.assert_close(program.module()(*tensors), Module()(*tensors))


@pytest.mark.parametrize("strict", [False, True])
def test_exports_numbers_that_follow_the_length(strict):
    class Module(torch.nn.Module):
        def forward(self, query, key, value):
            length = key.shape[2]
            whole = stable_mask_attention(query, key, value, gamma=1 / length)
            return whole + sink_attention(query, key, value, 0.1 * length, window=length // 2)

    def inputs(length):
        return tuple(t.detach() for t in make_inputs(1, 2, 2, length, length, 8, torch.float32))

    shapes = [{2: torch.export.Dim("length", min=2, max=512)}] * 3
    program = torch.export.export(Module(), inputs(16), dynamic_shapes=shapes, strict=strict)
    for length in (16, 33):
        tensors = inputs(length)
        torch.testing.assert_close(program.module()(*tensors), Module()(*tensors))


@pytest.mark.parametrize("backend", ["auto", "flash", "blocks", "reference"])
def test_autocast_reaches_the_kernel(backend):
    inputs = make_inputs(2, 4, 2, 33, 33, 16, torch.float32)
    mixed = (inputs[0], inputs[1], inputs[2].detach().bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = stable_mask_attention(*mixed, gamma=0.1, backend=backend)
    expected = stable_mask_attention(*(t.bfloat16() for t in mixed), gamma=0.1, backend=backend)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_gives_equal_gradients(use_reentrant):
    inputs = make_inputs(2, 4, 2, 33, 33, 16, torch.float32)
    attend = functools.partial(stable_mask_attention, gamma=0.1)
    out = checkpoint(attend, *inputs, use_reentrant=use_reentrant)
    grad = torch.randn_like(out)
    for ours, plain in zip(
        gradients_by_backward(out, inputs, grad), gradients(attend(*inputs), inputs, grad),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(ours, plain)


def gradients_by_backward(out, inputs, grad):
    out.backward(grad)
    return [tensor.grad for tensor in inputs]


def test_second_order_gradients_are_refused_by_flash_and_right_in_reference():
    inputs = make_inputs(1, 1, 1, 4, 4, 2, torch.float64)
    out = stable_mask_attention(*inputs, gamma=0.1, backend="flash")
    (grad,) = torch.autograd.grad(out.sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        grad.sum().backward()
    assert torch.autograd.gradgradcheck(
        lambda *t: stable_mask_attention(*t, gamma=0.1, backend="reference"), inputs
    )


def _sinks(query, key, value, sink):
    return sink_attention(query, key, value, sink, alibi_slopes=head_decay_rates(4), window=5)


def _loss(*inputs):
    return _sinks(*inputs).square().sum()


def _one_by_one(function, examples):
    results = [function(*example) for example in zip(*examples, strict=True)]
    return torch.utils._pytree.tree_map(lambda *parts: torch.stack(parts), *results)


def test_vmap_and_gradients_of_each_example():
    inputs = [torch.randn(3, 2, heads, 9, 8, dtype=torch.float64) for heads in (4, 2, 2)]
    inputs.append(torch.randn(3, 4, 1, dtype=torch.float64))
    torch.testing.assert_close(vmap(_sinks)(*inputs), _one_by_one(_sinks, inputs))
    each = grad(_loss, argnums=(0, 1, 2, 3))
    torch.testing.assert_close(vmap(each)(*inputs), _one_by_one(each, inputs))
    leaves = [tensor.requires_grad_() for tensor in inputs]
    out = vmap(_sinks)(*leaves)
    weights = torch.randn_like(out)
    for ours, expected in zip(
        gradients(out, leaves, weights), gradients(_one_by_one(_sinks, leaves), leaves, weights),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("learned", ["attn_mask", "alibi_slopes", "sink_logits"])
def test_what_is_learned_has_its_gradient_where_vmap_maps_it(learned):
    query, key, value = torch.randn(3, 2, 4, 9, 8, dtype=torch.float64)
    shape = {"attn_mask": (4, 9, 9), "alibi_slopes": (4,), "sink_logits": (4, 1)}[learned]
    leaf = torch.randn(3, *shape, dtype=torch.float64, requires_grad=True)

    def loss(each, backend):
        keywords = {"sink_logits": 0.3, learned: each, "backend": backend}
        return sink_attention(query, key, value, **keywords).square().sum()

    def total(leaf):
        return vmap(functools.partial(loss, backend="auto"))(leaf).sum()

    (expected,) = torch.autograd.grad(sum(loss(each, "reference") for each in leaf), leaf)
    torch.testing.assert_close(torch.autograd.grad(total(leaf), leaf), (expected,))
    torch.testing.assert_close(grad(total)(leaf.detach()), expected)


def _plain_loss(query, key, value):
    return sink_attention(query, key, value, 0.5).square().sum()


@pytest.mark.parametrize("transform", [grad, lambda loss: vmap(grad(loss))])
def test_transforms_in_a_compiled_function(transform):
    """The compiler sees no gradient in them: what it may see into, it would take an lse without one of."""
    transformed = transform(_plain_loss)
    shape = (2, 4, 9, 8) if transform is grad else (3, 2, 4, 9, 8)
    inputs = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), transformed(*inputs))


def test_vmap_over_some_arguments_and_masks():
    query = torch.randn(2, 4, 9, 3, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 9, 8, dtype=torch.float64)
    visible = torch.rand(3, 1, 1, 1, 9) > 0.3
    documents = torch.arange(9) // 4

    def attend(query, visible):
        return sink_attention(query, key, value, 0.0, attn_mask=visible, documents=documents)

    out = vmap(attend, in_dims=(3, 0))(query, visible)
    torch.testing.assert_close(out, _one_by_one(attend, (query.movedim(3, 0), visible)))
    gammas = torch.tensor([[0.1] * 4, [0.5] * 4])
    out = vmap(lambda g: stable_mask_attention(query[..., 0, :], key, value, gamma=g))(gammas)
    expected = stable_mask_attention(query[..., 0, :], key, value, gamma=0.5)
    torch.testing.assert_close(out[1], expected)
    with pytest.raises(NotImplementedError, match="alibi_slopes"):
        vmap(lambda s: sink_attention(query[..., 0, :], key, value, 0.0, alibi_slopes=s))(gammas)


def test_forward_mode_is_the_derivative():
    query, key, value, tangent = (torch.randn(1, 2, 5, 4, dtype=torch.float64) for _ in range(4))

    def attend(query):
        return stable_mask_attention(query, key, value, gamma=0.1)

    _, derivative = torch.func.jvp(attend, (query,), (tangent,))
    step = 1e-6
    difference = (attend(query + step * tangent) - attend(query - step * tangent)) / (2 * step)
    torch.testing.assert_close(derivative, difference, rtol=1e-6, atol=1e-8)
