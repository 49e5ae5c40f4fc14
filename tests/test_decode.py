"""A cached step of one token, by the stock kernel and by the compiled library: that it is right, and what the
library leaves to others."""

import math
import threading
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import EagerAndRecordGraphs
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stablemask import sink_attention, stable_mask_attention
from stablemask.backends.stock import kernels
from tests.marks import native_library
from tests.oracle import (
    assert_no_further_than_twice,
    doubled,
    gradients,
    make_inputs,
    sink_definition,
)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=["flash", pytest.param("native", marks=native_library)])
def backend(request):
    return request.param


def tensors(dtype=torch.float32, q_len=1, kv_len=19, **kwargs):
    return make_inputs(2, 4, 2, q_len, kv_len, 8, dtype, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["number", "heads", "rows", "expanded", "gamma"])
@pytest.mark.parametrize("layout", ["heads first", "tokens first", "cache view", "strided"])
def test_it_is_the_definition(backend, dtype, kind, layout):
    query, key, value = tensors(dtype)
    if layout == "tokens first":
        query, key, value = (
            t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)
        )
    if layout == "cache view":
        cache = torch.randn(2, 2, 2, 50, 8).to(dtype)
        key, value = cache[0, :, :, :19], cache[1, :, :, :19]
    if layout == "strided":
        query = torch.randn(2, 4, 1, 16).to(dtype)[..., ::2]
    sink = {"number": 0.3, "heads": torch.randn(4, 1), "rows": torch.randn(2, 1, 1).double(),
            "expanded": torch.randn(4, 3).t()[1:2].t().expand(2, 4, 1),
            "gamma": -19 * 0.05 - math.log(-math.expm1(-0.05))}[kind]  # fmt: skip

    def attend(name):
        if kind == "gamma":
            return stable_mask_attention(query, key, value, gamma=0.05, backend=name)
        return sink_attention(query, key, value, sink, backend=name)

    step = attend(backend)
    assert step.dtype == dtype
    exact = sink_definition(
        *doubled((query, key, value)), torch.as_tensor(sink, dtype=torch.float64)
    )
    distance = (attend("reference").double() - exact).abs().max()
    error = (step.double() - exact).abs().max()
    assert error <= 2 * distance + 4 * torch.finfo(dtype).eps


@native_library
@pytest.mark.parametrize(
    ("keywords", "reason"),
    [
        ({"q_len": 2}, "one row, or as many rows as keys"),
        ({"dropout_p": 0.1}, "no dropout"),
        ({"window": 3}, "no mask but a bool"),
        ({"attn_mask": torch.ones(2, 4, 1, 19, dtype=torch.bool)}, "no mask but a bool"),
        ({"attn_mask": torch.zeros(2, 1, 1, 19)}, "no mask but a bool"),
        ({"q_len": 19, "attn_mask": torch.ones(1, 1, 1, 19, dtype=torch.bool)}, "of one row"),
        ({"dtype": torch.bfloat16, "device": "meta"}, "the tensors are on 'meta'"),
    ],
)
def test_what_the_library_leaves_to_others(keywords, reason):
    shape = {name: keywords.pop(name) for name in ("q_len", "dtype") if name in keywords}
    device = keywords.pop("device", "cpu")
    inputs = [tensor.to(device) for tensor in tensors(**shape)]
    with pytest.raises(ValueError, match=f"'native' cannot serve this call: .*{reason}"):
        sink_attention(*inputs, 0.0, backend="native", **keywords)
    if device == "cpu":
        assert sink_attention(*inputs, 0.0, **keywords).shape == inputs[0].shape


def test_without_the_library_its_name_says_how_to_have_it(monkeypatch):
    monkeypatch.setattr("stablemask.backends.native.LIBRARY", None)
    with pytest.raises(ValueError, match="`stablemask build` compiles it"):
        sink_attention(*tensors(), 0.0, backend="native")


@pytest.mark.parametrize("of_all", [False, True])
def test_padding(backend, of_all):
    query, key, value = tensors()
    mask = torch.arange(19) > torch.tensor([[4], [18]]).view(2, 1, 1, 1)
    mask = mask[:1] if of_all else mask
    ours = stable_mask_attention(query, key, value, gamma=0.1, attn_mask=mask, backend=backend)
    sink = torch.full((1, 1), -19 * 0.1 - math.log(-math.expm1(-0.1)), dtype=torch.float64)
    exact = sink_definition(*doubled((query, key, value)), sink, visible=mask)
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-6)
    strided = torch.stack([mask, ~mask], -1)[..., 0]
    again = stable_mask_attention(query, key, value, gamma=0.1, attn_mask=strided, backend=backend)
    assert torch.equal(again, ours)


@pytest.mark.parametrize("scale", [0.7, 0.0, -0.7])
def test_scale_is_used(backend, scale):
    query, key, value = tensors()
    scaled = sink_attention(query, key, value, 0.0, scale=scale, backend="reference")
    ours = sink_attention(query, key, value, 0.0, scale=scale, backend=backend)
    torch.testing.assert_close(ours, scaled)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value_dim", [8, 24])
@pytest.mark.parametrize("scale", [None, -0.3])
@pytest.mark.parametrize("padded", [False, True])
def test_a_row_has_gradients(backend, dtype, value_dim, scale, padded):
    mask = None
    if padded:
        mask = torch.ones(2, 1, 1, 19, dtype=torch.bool)
        mask[0, ..., :5] = False
        mask[1] = False
    with torch.enable_grad():
        sink = torch.randn(4, 1, requires_grad=True)
        leaves = (*tensors(dtype, value_dim=value_dim), sink)
        grad = torch.randn(2, 4, 1, value_dim).to(dtype)
        results = []
        for inputs, name in (
            (leaves, backend),
            (leaves, "reference"),
            (doubled(leaves), "reference"),
        ):
            out = sink_attention(*inputs, attn_mask=mask, scale=scale, backend=name)
            results.append((out, *gradients(out, inputs, grad)))
    ours, dense, exact = results
    term = (grad.double() * exact[0]).abs().sum(-1).max().clamp(min=1)
    assert_no_further_than_twice(ours, dense, exact, 4 * term if dtype == torch.float64 else term)


@pytest.mark.parametrize("sink", [0.3, torch.zeros(4, 1)])
def test_a_step_by_the_stock_kernel_has_three_operations_more(sink):
    """Each takes as long as a quarter of the kernel behind 512 keys; views are free beside them."""
    launched = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if not function.is_view:
                launched.append(function.__name__.partition(".")[0])
            return function(*args, **(kwargs or {}))

    inputs = tensors()
    with Count():
        sink_attention(*inputs, sink, backend="flash")
    assert launched == [
        "_scaled_dot_product_flash_attention_for_cpu", "sub_", "sigmoid_", "mul_"
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mask", [None, "padding", "of each head"])
@pytest.mark.parametrize("threads", [4, 5])
def test_heads_that_share_a_key_head_are_its_rows(monkeypatch, dtype, mask, threads):
    """The keys are read once for all of them, where every thread has a key head."""
    kernel = torch._scaled_dot_product_flash_attention_for_cpu
    monkeypatch.setattr(kernels, "_MANY_SCORES", 4 * 19)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    called = Mock(wraps=kernel)
    monkeypatch.setattr(torch, kernel.__name__, called)
    query, key, value = tensors(dtype)
    sink = torch.randn(2, 4, 1)
    seen = torch.ones(2, 1, 1, 19, dtype=torch.bool)
    bias = None
    if mask == "padding":
        seen[0, ..., :5] = False
        seen[1] = False
    if mask == "of each head":
        bias = torch.randn(2, 4, 1, 19).to(dtype)
        bias[0, 1] = -torch.inf
    given = bias if mask == "of each head" else seen if mask else None
    step = sink_attention(query, key, value, sink, attn_mask=given, backend="flash")
    assert called.call_args.args[0].shape == ((2, 2, 2, 8) if threads == 4 else (2, 4, 1, 8))
    dense = sink_attention(query, key, value, sink, attn_mask=given, backend="reference")
    exact = sink_definition(
        *doubled((query, key, value)), sink.double(), seen, None if bias is None else bias.double()
    )
    term = value.double().abs().max()
    assert_no_further_than_twice((step,), (dense,), (exact,), term)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [3, 6, 12, 24])
def test_heads_that_share_keys(backend, dtype, heads):
    """One, two, four and eight query heads to a key head."""
    query, key, value = make_inputs(2, heads, 3, 1, 33, 16, dtype)
    sinks = torch.randn(2, heads, 1)
    step = sink_attention(query, key, value, sinks, backend=backend)
    exact = sink_definition(*doubled((query, key, value)), sinks.double())
    assert step.shape == query.shape
    assert (step.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps


@native_library
@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 9),
    key_heads=st.integers(1, 3),
    kv_len=st.sampled_from([1, 2, 15, 16, 17, 511, 512, 513, 1024, 1500]),
    head_dim=st.integers(1, 150),
    value_dim=st.integers(1, 150),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    threads=st.sampled_from([1, 2, 3]),
    mask=st.sampled_from([None, "of each", "of all"]),
    seed=st.integers(0, 99),
)
def test_every_shape(
    batch, groups, key_heads, kv_len, head_dim, value_dim, dtype, threads, mask, seed
):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    query = normal(batch, groups * key_heads, 1, head_dim)
    # Views of caches that hold more.
    key = normal(batch, kv_len + 3, key_heads, head_dim + 1)[:, :kv_len, :, 1:].transpose(1, 2)
    value = normal(batch, key_heads, kv_len + 2, value_dim)[:, :, 2:]
    sinks = 2 * normal(batch, groups * key_heads, 1)
    seen = None
    if mask is not None:  # the first keys are padding, all of them in the last sequence
        first = torch.linspace(0, kv_len, batch if mask == "of each" else 1).round()
        seen = torch.arange(kv_len) >= first.reshape(-1, 1, 1, 1)
    step = sink_attention(query, key, value, sinks, attn_mask=seen, backend="native")
    assert step.shape == (batch, groups * key_heads, 1, value_dim)
    exact = sink_definition(*doubled((query, key, value)), sinks.double(), visible=seen)
    # Scores are sums of head_dim products, and their errors are those of the logarithms of the weights.
    eps = torch.finfo(dtype).eps
    kernel = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    bound = eps / 2 * exact.abs().max() + 8 * kernel * head_dim**0.5 * value.double().abs().max()
    assert (step.double() - exact).abs().max() <= bound
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        again = sink_attention(query, key, value, sinks, attn_mask=seen, backend="native")
        assert torch.equal(again, step)
    finally:
        torch.set_num_threads(before)


@native_library
def test_numbers_that_are_not_finite():
    query, key, value = make_inputs(1, 4, 2, 1, 1100, 24, torch.float32)
    plain = sink_attention(query, key, value, 0.0, backend="native")
    for chunk in (0, 600, 1099):
        damaged = key.clone()
        damaged[0, 1, chunk, 3] = math.nan
        step = sink_attention(query, damaged, value, 0.0, backend="native")
        assert torch.equal(step[:, :2], plain[:, :2])
        assert step[:, 2:].isnan().all()
    # Scores of -inf, for some keys, a whole chunk, or all.
    query = query.abs()
    for removed in (slice(5, 7), slice(0, 512), slice(0, 1100)):
        damaged = key.clone()
        damaged[:, :, removed] = -math.inf
        step = sink_attention(query, damaged, value, 0.3, backend="native")
        weights = (query.double() @ damaged.double().repeat_interleave(2, 1).mT) * 24**-0.5
        weights = torch.cat([weights, torch.full((1, 4, 1, 1), 0.3).double()], -1).softmax(-1)
        exact = weights[..., :-1] @ value.double().repeat_interleave(2, 1)
        torch.testing.assert_close(step.double(), exact, atol=1e-6, rtol=0)


def test_sinks_that_take_nothing_and_all(backend):
    query, key, value = tensors()
    stock = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    none = sink_attention(query, key, value, -math.inf, backend=backend)
    torch.testing.assert_close(none, stock)
    sinks = torch.tensor([[-math.inf], [math.inf], [200.0], [-200.0]])
    step = sink_attention(query, key, value, sinks, backend=backend)
    torch.testing.assert_close(step[:, ::3], stock[:, ::3])
    assert not step[:, 1:3].any()


@native_library
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("q_len", [1, 1100])
def test_its_logsumexp_holds_the_sink(q_len, dtype):
    query, key, value = (t.detach() for t in make_inputs(1, 4, 2, q_len, 1100, 16, dtype))
    sinks = torch.tensor([0.5, math.inf, -math.inf, 40.0]).view(1, 4, 1)
    _, lse = torch.ops.stablemask.native_forward(query, key, value, sinks, None, 0.25)
    scores = query.double() @ key.double().repeat_interleave(2, 1).mT * 0.25
    scores = scores.masked_fill(torch.ones(q_len, 1100).triu(1101 - q_len).bool(), -math.inf)
    exact = torch.logaddexp(scores.logsumexp(-1), sinks.double())
    assert lse.dtype == torch.promote_types(dtype, torch.float32)
    # Tiles round the weights that they sum.
    tolerance = max(1e-5, torch.finfo(dtype).eps)
    torch.testing.assert_close(lse.double(), exact.expand_as(lse), rtol=1e-5, atol=tolerance)


@native_library
@pytest.mark.parametrize("q_len", [1, 19])
@pytest.mark.parametrize("padded", [False, True])
def test_the_operators_are_as_pytorch_wants_them(q_len, padded):
    """Their schemas, autograd, shapes without numbers, and what a compiler makes of them."""
    mask = torch.arange(19).view(1, 1, 1, 19) > 4 if padded and q_len == 1 else None
    ops = torch.ops.stablemask
    with torch.enable_grad():
        query, key, value = tensors(q_len=q_len)
        sink = torch.randn(1, 4, 1, requires_grad=True)
        inputs = (query, key, value, sink, mask)
        torch.library.opcheck(ops.native_forward.default, (*inputs, 0.4))
        out, lse = ops.native_forward(*inputs, 0.4)
        rest = (out.detach(), lse.detach(), 0.4)
        detached = [t if t is None else t.detach() for t in inputs]
        for of_sink in (False, True):
            given = (torch.randn_like(out), *detached, *rest, of_sink)
            torch.library.opcheck(ops.native_backward.default, given)


@native_library
def test_the_operators_read_no_memory_that_is_not_theirs():
    query, key, value = tensors()
    sink, forward = torch.zeros(1, 1, 1), torch.ops.stablemask.native_forward
    forward(query, key, value, sink, None, 0.3)
    long = torch.ones(2, 1, 1, 20, dtype=torch.bool)
    for changed in (
        (query[:, :3], key, value, sink, None), (query, key, value[:, :, 1:], sink, None),
        (query[..., 1:], key, value, sink, None), (query, key.double(), value, sink, None),
        (query, key[:1], value[:1], sink, None), (query, key, value, sink[0], None),
        (query, key, value, torch.zeros(1, 3, 1), None), (query, key, value, sink, long),
        (query.expand(2, 4, 2, 8), key, value, sink, None), (query[:0], key[:0], value[:0], sink, None),
        (query, key, value, sink.long(), None), (query, key, value, sink, long[..., :19].float()),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            forward(*changed, 0.3)


def test_tensors_that_are_more_than_their_memory():
    query, key, value = tensors()
    sinks = torch.nn.Parameter(torch.randn(4, 1))
    expected = sink_attention(query, key, value, sinks.detach(), backend="flash")
    torch.testing.assert_close(sink_attention(query, key, value, sinks), expected)

    class Marked(torch.Tensor):
        pass

    marked = sink_attention(query.as_subclass(Marked), key, value, sinks)
    assert type(marked) is Marked
    torch.testing.assert_close(marked.as_subclass(torch.Tensor), expected)
    negated = torch._neg_view(query)  # a view whose sign is not in memory
    torch.testing.assert_close(
        sink_attention(negated, key, value, sinks),
        sink_attention(-query, key, value, sinks, backend="flash"),
    )
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        out = sink_attention(dual, key, value, sinks)
        assert forward_ad.unpack_dual(out).tangent is not None
    stacked = torch.stack([query, query])
    mapped = torch.func.vmap(lambda q: sink_attention(q, key, value, sinks))(stacked)
    torch.testing.assert_close(mapped, torch.stack([expected, expected]))


def test_modes_see_the_call(backend):
    query, key, value = tensors()
    seen = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    expected = sink_attention(query, key, value, 0.5, backend="reference")
    for mode in (Functions, Operators):
        with mode():
            out = sink_attention(query, key, value, 0.5, backend=backend)
        kernel = "native_forward" if backend == "native" else "flash_attention"
        assert any(kernel in str(function) for function in seen)
        torch.testing.assert_close(out, expected)
        seen.clear()
    with FakeTensorMode() as fake:
        imagined = [fake.from_tensor(t) for t in (query, key, value)]
        assert sink_attention(*imagined, 0.5, backend=backend).shape == query.shape


@pytest.mark.parametrize("q_len", [1, 19])
@pytest.mark.parametrize("training", [False, True])
@native_library
def test_a_compiled_graph_holds_the_operator(q_len, training):
    """Of any number of keys; what is exported holds it not, for it may run where nothing is compiled."""

    def attend(query, key, value, sink):
        return 2 * sink_attention(query, key, value, sink)

    torch.compiler.reset()
    recorded = EagerAndRecordGraphs()
    compiled = torch.compile(attend, backend=recorded, fullgraph=True, dynamic=True)
    for kv_len in (19, 23):
        with torch.set_grad_enabled(training):
            inputs = (*tensors(q_len=kv_len if q_len > 1 else 1, kv_len=kv_len), torch.randn(4, 1))
            out = compiled(*inputs)
            torch.testing.assert_close(out, attend(*inputs))
            if training:
                grad = torch.randn_like(out)
                found, expected = (gradients(o, inputs[:3], grad) for o in (out, attend(*inputs)))
                torch.testing.assert_close(found, expected)
    assert len(recorded.graphs) == 1
    assert "stablemask.native_forward" in str(recorded.graphs[0].graph)

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return attend(*inputs)

    program = torch.export.export(Module(), tuple(t.detach() for t in inputs))
    assert "native" not in str(program.graph)
    torch.testing.assert_close(program.module()(*inputs), out)


def test_it_serves_inference_mode(backend):
    query, key, value = tensors()
    expected = sink_attention(query, key, value, 0.5, backend="reference")
    with torch.inference_mode():
        ours = sink_attention(query, key, value, 0.5, backend=backend)
    torch.testing.assert_close(ours, expected)


def test_threads_share_it():
    """Calls of several threads at a time, which let go of the interpreter's lock, do not disturb each other."""
    inputs = [make_inputs(1, 4, 4, 1, 2000, 64, torch.float32) for _ in range(4)]
    expected = [sink_attention(*each, 0.5) for each in inputs]
    found: dict[int, list] = {}

    def work(i):
        with torch.no_grad():
            found[i] = [sink_attention(*inputs[i], 0.5) for _ in range(50)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, steps in found.items():
        assert all(torch.equal(step, expected[i]) for step in steps)
