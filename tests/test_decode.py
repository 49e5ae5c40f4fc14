"""A cached step of one token: that it takes its short way, in either language, and that nothing else does."""

import math
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from stablemask import plain, sink_attention, stable_mask_attention
from stablemask.plain import plain_attention
from stablemask.processor import Units
from tests.marks import native_library
from tests.oracle import doubled, make_inputs, sink_definition


@pytest.fixture(autouse=True, params=["Python", pytest.param("C++", marks=native_library)], ids=str)
def language(request, monkeypatch):
    """Without gradients, with the step in that language."""
    if request.param == "Python":
        monkeypatch.setattr(plain, "LIBRARY", None)
    with torch.no_grad():
        yield request.param


in_cpp = pytest.mark.parametrize(
    "language", [pytest.param("C++", marks=native_library)], indirect=True
)


def tensors(dtype=torch.float32, q_len=1, kv_len=19, **kwargs):
    return make_inputs(2, 4, 2, q_len, kv_len, 8, dtype, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["number", "heads", "rows", "expanded", "gamma"])
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
    sink = {"number": 0.3, "heads": torch.randn(4, 1), "rows": torch.randn(2, 1, 1).double(),
            "expanded": torch.randn(4, 3).t()[1:2].t().expand(2, 4, 1), "gamma": None}[kind]  # fmt: skip
    if kind == "gamma":
        step = plain_attention(query, key, value, gamma=0.05)
        public = stable_mask_attention(query, key, value, gamma=0.05)
        general = stable_mask_attention(query, key, value, gamma=0.05, backend="flash")
        sink = -19 * 0.05 - math.log(-math.expm1(-0.05))
    else:
        step = plain_attention(query, key, value, sink_logits=sink)
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
    assert plain_attention(query, key, value) is not None
    wide = torch.randn(2, 4, 1, 16)[..., ::2]
    narrow = plain_attention(query, key, value[..., :5])
    assert (narrow is None) == (plain.LIBRARY is None)  # the stock kernel takes one width only
    for changed in (
        (wide, key, value),
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
        assert plain_attention(*changed) is None
    for keywords in (
        {"gamma": 0.0}, {"gamma": float("nan")}, {"gamma": torch.ones(4)}, {"gamma": 1},
        {"sink_logits": torch.zeros(4)}, {"sink_logits": torch.zeros(2, 1)}, {"sink_logits": 1}, {"sink_logits": math.nan},
        {"sink_logits": torch.zeros(4, 1, dtype=torch.int64)},
        {"scale": float("nan")}, {"scale": 1},
    ):  # fmt: skip
        assert plain_attention(query, key, value, **keywords) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert plain_attention(query, key, value) is None
        assert sink_attention(query, key, value, 0.0).dtype == torch.bfloat16
    with torch.enable_grad():
        assert plain_attention(query, key, value) is None
    assert torch.func.vmap(lambda q: sink_attention(q, key, value, 0.0))(
        torch.stack([query, query])
    ).shape == (2, 2, 4, 1, 8)


def test_masks_it_leaves_to_the_general_way():
    query, key, value = tensors()
    for mask in (
        torch.ones(2, 4, 1, 19, dtype=torch.bool),
        torch.ones(1, 19, dtype=torch.bool),
        torch.ones(2, 1, 1, 18, dtype=torch.bool),
        torch.ones(2, 1, 19, 1, dtype=torch.bool).transpose(2, 3)[..., ::2],
        torch.zeros(2, 1, 1, 19),
        [True],
    ):
        assert plain_attention(query, key, value, attn_mask=mask) is None
    mask = torch.arange(19).expand(2, 1, 1, 19) > 4
    ours = stable_mask_attention(query, key, value, gamma=0.1, attn_mask=mask)
    general = stable_mask_attention(query, key, value, gamma=0.1, attn_mask=mask, backend="flash")
    torch.testing.assert_close(ours, general)


@pytest.mark.parametrize("scale", [0.7, 0.0, -0.7])
def test_scale_is_used(scale):
    query, key, value = tensors()
    scaled = sink_attention(query, key, value, 0.0, scale=scale, backend="reference")
    torch.testing.assert_close(sink_attention(query, key, value, 0.0, scale=scale), scaled)


@pytest.mark.parametrize("units", [Units(True, True), Units(False, True), Units(False, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [3, 6, 12, 24])
def test_heads_that_share_keys(dtype, heads, units, monkeypatch):
    """One, two, four and eight query heads to a key head, which are rows of one call or are not."""
    monkeypatch.setattr(plain, "UNITS", units)
    query, key, value = make_inputs(2, heads, 3, 1, 33, 16, dtype)
    sinks = torch.randn(2, heads, 1)
    step = plain_attention(query, key, value, sink_logits=sinks)
    exact = sink_definition(*doubled((query, key, value)), sinks.double())
    assert step.shape == query.shape
    assert (step.double() - exact).abs().max() <= 8 * torch.finfo(dtype).eps


@in_cpp
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
    step = plain_attention(query, key, value, sink_logits=sinks, attn_mask=seen)
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
        again = plain_attention(query, key, value, sink_logits=sinks, attn_mask=seen)
        assert torch.equal(again, step)
    finally:
        torch.set_num_threads(before)


@in_cpp
def test_numbers_that_are_not_finite():
    query, key, value = make_inputs(1, 4, 2, 1, 1100, 24, torch.float32)
    plain = plain_attention(query, key, value, sink_logits=0.0)
    for chunk in (0, 600, 1099):
        damaged = key.clone()
        damaged[0, 1, chunk, 3] = math.nan
        step = plain_attention(query, damaged, value, sink_logits=0.0)
        assert torch.equal(step[:, :2], plain[:, :2])
        assert step[:, 2:].isnan().all()
    # Scores of -inf, for some keys, a whole chunk, or all.
    query = query.abs()
    for removed in (slice(5, 7), slice(0, 512), slice(0, 1100)):
        damaged = key.clone()
        damaged[:, :, removed] = -math.inf
        step = plain_attention(query, damaged, value, sink_logits=0.3)
        weights = (query.double() @ damaged.double().repeat_interleave(2, 1).mT) * 24**-0.5
        weights = torch.cat([weights, torch.full((1, 4, 1, 1), 0.3).double()], -1).softmax(-1)
        exact = weights[..., :-1] @ value.double().repeat_interleave(2, 1)
        torch.testing.assert_close(step.double(), exact, atol=1e-6, rtol=0)


def test_how_many_rows_the_kernel_is_given(monkeypatch):
    half, full = (torch.bfloat16, torch.float16), (torch.float32, torch.float64)
    monkeypatch.setattr(plain, "UNITS", Units(True, True))
    assert [[plain._rows_of(g, d) for g in (1, 2, 3, 4)] for d in half] == [[0, 0, 0, 4]] * 2
    assert [[plain._rows_of(g, d) for g in (1, 2, 3, 4)] for d in full] == [[0, 2, 3, 4]] * 2
    monkeypatch.setattr(plain, "UNITS", Units(False, True))
    assert [plain._rows_of(1, d) for d in (*half, *full)] == [4, 0, 0, 0]
    assert [plain._rows_of(2, d) for d in (*half, *full)] == [2, 2, 2, 2]
    monkeypatch.setattr(plain, "UNITS", Units(False, False))
    assert [plain._rows_of(1, d) for d in (*half, *full)] == [0, 0, 0, 0]


def test_sinks_that_take_nothing_and_all():
    query, key, value = tensors()
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(plain_attention(query, key, value, sink_logits=-math.inf), plain)
    sinks = torch.tensor([[-math.inf], [math.inf], [200.0], [-200.0]])
    step = plain_attention(query, key, value, sink_logits=sinks)
    torch.testing.assert_close(step[:, ::3], plain[:, ::3])
    assert not step[:, 1:3].any()


def test_tensors_that_are_more_than_their_memory():
    query, key, value = tensors()
    sinks = torch.nn.Parameter(torch.randn(4, 1))
    expected = sink_attention(query, key, value, sinks.detach(), backend="flash")
    torch.testing.assert_close(plain_attention(query, key, value, sink_logits=sinks), expected)

    class Marked(torch.Tensor):
        pass

    for changed in (
        (query.as_subclass(Marked), key, value),
        (query, key.as_subclass(Marked), value),
        (query, key, value.to_sparse()),
    ):
        assert plain_attention(*changed) is None
    assert plain_attention(query, key, value, sink_logits=sinks.as_subclass(Marked)) is None
    negated = torch._neg_view(query)  # a view whose sign is not in memory
    torch.testing.assert_close(
        sink_attention(negated, key, value, sinks),
        sink_attention(-query, key, value, sinks, backend="flash"),
    )
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, torch.ones_like(query))
        out = sink_attention(dual, key, value, sinks)
        assert forward_ad.unpack_dual(out).tangent is not None


def test_modes_see_the_call():
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

    expected = sink_attention(query, key, value, 0.5, backend="flash")
    for mode in (Functions, Operators):
        with mode():
            out = sink_attention(query, key, value, 0.5)
        assert any("flash_attention" in str(function) for function in seen)
        torch.testing.assert_close(out, expected)
        seen.clear()
    with FakeTensorMode() as fake:
        imagined = [fake.from_tensor(t) for t in (query, key, value)]
        assert sink_attention(*imagined, 0.5).shape == query.shape


def test_it_is_compiled_into_graphs_and_serves_inference_mode():
    query, key, value = tensors()
    expected = sink_attention(query, key, value, 0.5)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *args: sink_attention(*args, 0.5), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(query, key, value), expected)
    with torch.inference_mode():
        assert plain_attention(query, key, value, sink_logits=0.5) is not None


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
