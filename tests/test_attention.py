"""What must hold of attention with a pseudo mass (docs/method.md), on every backend of this machine.

The tolerance of float32 and bfloat16 is derived: twice the distance of the dense backend, in the same
dtype, from the definition in float64, and four roundings (of the output in the kernel, when the sink
scales it, in ``rowsum(grad * out)`` and of the result) of the largest term that is summed.
"""

import functools

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from stablemask import head_decay_rates, sink_attention, stable_mask_attention
from stablemask.backends import native
from tests.oracle import (
    assert_no_further_than_twice,
    doubled,
    gradients,
    make_inputs,
    sink_definition,
    stable_mask_definition,
)

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def compare(attend, define, inputs):
    """Outputs and every gradient: flash, and the dense backend, against the definition."""
    exact_inputs = doubled(inputs)
    exact = define(*exact_inputs)
    grad = torch.randn_like(exact).to(inputs[0].dtype)
    truth = (exact, *gradients(exact, exact_inputs, grad))
    results = {}
    for backend in ("flash", "reference"):
        out = attend(*inputs, backend=backend)
        assert out.dtype == inputs[0].dtype
        results[backend] = (out, *gradients(out, inputs, grad))
    if inputs[0].dtype == torch.float64:
        # The sink logits of StableMask are float32, hence 1e-6; the algebra itself is tighter below.
        for ours, expected in zip(results["reference"], truth, strict=True):
            torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-6)
    term = (grad.double() * exact).abs().sum(-1).max()
    assert_no_further_than_twice(results["flash"], results["reference"], truth, term)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 7, 63, 257])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("gamma", ["number", "slopes"])
def test_backends_equal_the_definition(dtype, length, kv_heads, gamma):
    gamma = 0.02 if gamma == "number" else head_decay_rates(4)
    horizon = length + 3
    compare(
        functools.partial(stable_mask_attention, gamma=gamma, horizon=horizon),
        functools.partial(stable_mask_definition, gamma=gamma, horizon=horizon),
        make_inputs(2, 4, kv_heads, length, length, 16, dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("q_len", "kv_len"), [(7, 7), (63, 63), (1, 40), (7, 40), (40, 63)])
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_sink_attention_with_cache_and_padding(dtype, q_len, kv_len, side):
    visible = None
    if side != "none":
        visible = torch.ones(2, 1, 1, kv_len, dtype=torch.bool)
        hidden = slice(0, 5) if side == "left" else slice(kv_len - 3, None)
        visible[0, ..., hidden] = False
    sink = torch.randn(4, q_len).requires_grad_()
    compare(
        lambda q, k, v, s, backend: sink_attention(q, k, v, s, attn_mask=visible, backend=backend),
        lambda q, k, v, s: sink_definition(q, k, v, s, visible=visible),
        (*make_inputs(2, 4, 2, q_len, kv_len, 16, dtype), sink),
    )


def test_the_algebra_is_exact_in_float64():
    inputs = make_inputs(2, 4, 2, 33, 57, 16, torch.float64)
    sink = torch.randn(2, 4, 33, dtype=torch.float64, requires_grad=True)
    out = sink_attention(*inputs, sink, backend="flash")
    exact = sink_definition(*inputs, sink)
    grad = torch.randn_like(out)
    torch.testing.assert_close(out, exact, rtol=1e-13, atol=1e-14)
    for ours, truth in zip(
        gradients(out, (*inputs, sink), grad), gradients(exact, (*inputs, sink), grad), strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("backend", ["flash", "reference"])
@pytest.mark.parametrize("side", ["left", "right", "all"])
def test_a_row_that_sees_nothing_is_zero_and_passes_no_gradient(backend, side):
    query, key, value = inputs = make_inputs(2, 2, 1, 6, 6, 8, torch.float32)
    visible = torch.ones(2, 1, 1, 6, dtype=torch.bool)
    visible[0, ..., {"left": slice(0, 2), "right": slice(4, 6), "all": slice(0, 6)}[side]] = False
    blind = {"left": slice(0, 2), "right": slice(0, 0), "all": slice(0, 6)}[side]
    for sink in (torch.zeros(2, 1), torch.full((2, 1), -torch.inf)):
        sink.requires_grad_()
        out = sink_attention(query, key, value, sink, attn_mask=visible, backend=backend)
        assert (out[0, :, blind] == 0).all()
        grads = gradients(out, (*inputs, sink), torch.randn_like(out))
        assert all(grad.isfinite().all() for grad in grads)
        assert (grads[0][0, :, blind] == 0).all()


@pytest.mark.parametrize("backend", ["flash", "reference"])
def test_infinite_sinks(backend):
    inputs = make_inputs(1, 3, 3, 9, 9, 8, torch.float64)
    sink = torch.tensor([[-torch.inf], [torch.inf], [0.0]], requires_grad=True)
    out = sink_attention(*inputs, sink, backend=backend)
    plain = F.scaled_dot_product_attention(*inputs, is_causal=True)
    torch.testing.assert_close(out[:, 0], plain[:, 0])
    assert (out[:, 1] == 0).all()
    grads = gradients(out, (*inputs, sink), torch.randn_like(out))
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[3][0] == 0
    assert grads[3][1] == 0
    assert grads[3][2] != 0


@pytest.mark.parametrize("shape", [(), (5, 1), (1, 7), (5, 7), (2, 1, 1), (2, 5, 7), (2, 1, 7)])
def test_sink_logits_of_every_broadcast_shape(shape):
    sink = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    compare(
        lambda q, k, v, s, backend: sink_attention(q, k, v, s, backend=backend),
        sink_definition,
        (*make_inputs(2, 5, 1, 7, 7, 8, torch.float64), sink),
    )


def test_a_number_is_softmax_off_by_one():
    inputs = make_inputs(1, 2, 2, 9, 9, 8, torch.float64)
    torch.testing.assert_close(
        sink_attention(*inputs, 0.0), sink_definition(*inputs, torch.zeros(1, 1))
    )


def test_last_row_of_a_finite_horizon_is_plain_causal():
    query, key, value = make_inputs(1, 4, 4, 31, 31, 16, torch.float64)
    out = stable_mask_attention(query, key, value, gamma=0.05, horizon=31)
    plain = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(out[:, :, -1], plain[:, :, -1])
    assert (out[:, :, :-1] - plain[:, :, :-1]).abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("horizon", [None, 31])
def test_large_gamma_tends_to_plain_causal(horizon):
    inputs = make_inputs(1, 4, 4, 31, 31, 16, torch.float64)
    out = stable_mask_attention(*inputs, gamma=80.0, horizon=horizon)
    plain = F.scaled_dot_product_attention(*inputs, is_causal=True)
    torch.testing.assert_close(out, plain)


@pytest.mark.parametrize("gamma", [0.01, "slopes"])
@pytest.mark.parametrize("chunks", [[1] * 12, [5, 1, 1, 5], [1, 11], [12]])
def test_prefill_and_decode_equal_one_pass(gamma, chunks):
    gamma = head_decay_rates(4) if gamma == "slopes" else gamma
    query, key, value = make_inputs(2, 4, 2, 12, 12, 16, torch.float64)
    whole = stable_mask_attention(query, key, value, gamma=gamma)
    parts, start = [], 0
    for size in chunks:
        stop = start + size
        parts.append(
            stable_mask_attention(
                query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop], gamma=gamma
            )
        )
        start = stop
    torch.testing.assert_close(torch.cat(parts, 2), whole, rtol=1e-12, atol=1e-12)


def test_positions_undo_left_padding():
    query, key, value = make_inputs(1, 4, 4, 10, 10, 16, torch.float64)
    alone = stable_mask_attention(query, key, value, gamma=0.1)
    padded = [F.pad(t, (0, 0, 3, 0), value=7.0) for t in (query, key, value)]
    mask = (torch.arange(13) >= 3).view(1, 1, 1, 13)
    positions = (torch.arange(13) - 3).clamp(min=0)
    out = stable_mask_attention(*padded, gamma=0.1, positions=positions, attn_mask=mask)
    torch.testing.assert_close(out[:, :, 3:], alone)
    assert (out[:, :, :3] == 0).all()


def test_positions_per_sequence_restart_with_each_document():
    query, key, value = make_inputs(2, 2, 2, 9, 9, 8, torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], list(range(9))])
    same = torch.ones(2, 1, 9, 9, dtype=torch.bool)
    same[0, 0, 4:, :4] = False
    out = stable_mask_attention(query, key, value, gamma=0.2, positions=positions, attn_mask=same)
    for document in (slice(0, 4), slice(4, 9)):
        alone = stable_mask_attention(*(t[:1, :, document] for t in (query, key, value)), gamma=0.2)
        torch.testing.assert_close(out[:1, :, document], alone)
    torch.testing.assert_close(
        out[1:], stable_mask_attention(query[1:], key[1:], value[1:], gamma=0.2)
    )


@pytest.mark.parametrize("horizon", [None, 64])
@pytest.mark.parametrize("gamma", [1e-3, 0.1, "slopes"])
def test_real_mass_of_equal_scores_rises_with_the_row(horizon, gamma):
    gamma = head_decay_rates(2) if gamma == "slopes" else gamma
    query = torch.zeros(1, 2, 64, 8, dtype=torch.float64)
    value = torch.ones(1, 2, 64, 8, dtype=torch.float64)
    mass = stable_mask_attention(query, query, value, gamma=gamma, horizon=horizon)[0, :, :, 0]
    assert (mass.diff(dim=-1) > 0).all()
    assert (mass > 0).all()
    assert (mass <= 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["bool", "float", "window", "alibi", "documents", "all"])
@pytest.mark.parametrize(("q_len", "kv_len"), [(19, 19), (6, 19), (1, 19)])
@pytest.mark.parametrize("rows_in_block", [4, 256])
def test_masks_equal_the_definition(dtype, mask, q_len, kv_len, rows_in_block, monkeypatch):
    monkeypatch.setattr("stablemask.backends.stock.tiles.ROWS_IN_BLOCK", rows_in_block)
    monkeypatch.setattr("stablemask.backends.stock.tiles.ROWS_IN_HALF_BLOCK", rows_in_block)
    distance = torch.arange(kv_len - q_len, kv_len).unsqueeze(-1) - torch.arange(kv_len)
    allowed = torch.rand(2, 1, q_len, kv_len) > 0.3
    added = torch.randn(1, 4, q_len, kv_len, dtype=torch.float64)
    slopes = head_decay_rates(4)
    alibi = -slopes.double().view(1, 4, 1, 1) * distance
    documents = torch.stack([torch.arange(kv_len) // 7, torch.arange(kv_len) // 3])
    same = documents[:, None, kv_len - q_len :, None] == documents[:, None, None, :]
    keywords, visible, bias = {
        "bool": ({"attn_mask": allowed}, allowed, None),
        "float": ({"attn_mask": added}, None, added),
        "window": ({"window": 5}, distance < 5, None),
        "alibi": ({"alibi_slopes": slopes}, None, alibi),
        "documents": ({"documents": documents}, same, None),
        "all": (
            {"attn_mask": allowed, "window": 5, "alibi_slopes": slopes, "documents": documents},
            allowed & (distance < 5) & same,
            alibi,
        ),
    }[mask]
    sink = torch.randn(4, 1, dtype=torch.float64, requires_grad=True)
    compare(
        lambda q, k, v, s, backend: sink_attention(q, k, v, s, backend=backend, **keywords),
        lambda q, k, v, s: sink_definition(q, k, v, s, visible=visible, bias=bias),
        (*make_inputs(2, 4, 2, q_len, kv_len, 8, dtype), sink),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 12.0])
def test_alibi_leaves_out_no_key_that_matters(dtype, size):
    """Far keys are hidden where no score could make up for their distance; here one does."""
    query, key, value = make_inputs(1, 2, 1, 600, 600, 8, dtype)
    with torch.no_grad():
        query.mul_(size)
        key[:, :, 0] = query[:, :1, -1] * 0.575 * 599 * 8**0.5 / query[:, :1, -1].square().sum()
    inputs = (query, key, value)
    exact_inputs = doubled(inputs)

    def attend(tensors, backend):
        slopes = torch.tensor([0.5, 0.01])
        return sink_attention(*tensors, 0.0, alibi_slopes=slopes, backend=backend)

    exact = attend(exact_inputs, "reference")
    weights = torch.autograd.grad(exact[0, 0, -1, 0], exact_inputs[2], retain_graph=True)[0]
    assert weights[0, 0, 0, 0] > 1e-3  # 599 keys away, and seen
    grad = torch.randn_like(exact).to(dtype)
    out = attend(inputs, "flash")
    # Scores of some 350 are rounded by that many units in float32, and weights by as much of their size.
    unit = max(torch.finfo(dtype).eps, 350 * torch.finfo(torch.float32).eps)
    for ours, truth in zip(
        (out, *gradients(out, inputs, grad)), (exact, *gradients(exact, exact_inputs, grad)),
        strict=True,
    ):  # fmt: skip
        assert (ours.double() - truth).abs().max() <= 8 * unit * truth.abs().max()


class LargestTensor(TorchDispatchMode):
    """The elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, size)
        return result


@pytest.mark.parametrize("mask", ["alibi", "window", "documents"])
def test_masks_by_distance_are_linear_in_memory(mask):
    from stablemask.backends.stock.operators import backward, forward
    from stablemask.backends.stock.tiles import ROWS_IN_BLOCK

    heads, length = 2, 2048
    slopes = head_decay_rates(heads) if mask == "alibi" else None
    window = 64 if mask == "window" else None
    documents = torch.arange(length)[None] // 100 if mask == "documents" else None
    query, key, value = (torch.randn(1, heads, length, 8) for _ in range(3))
    rest = (None, slopes, window, documents, 0, 0.3, "cpu")
    with LargestTensor() as largest:  # inside the operators, which a mode around them would not see
        out, lse = forward(query, key, value, torch.zeros(1, 1, 1), *rest)
        backward(out, query, key, value, out, lse, *rest)
    assert 0 < largest.elements <= heads * ROWS_IN_BLOCK * length


@pytest.mark.parametrize("backend", ["flash", "reference"])
@pytest.mark.parametrize("shape", [(0, 5, 5), (2, 0, 0), (2, 0, 4), (1, 1, 1)])
def test_empty_and_single_lengths(backend, shape):
    batch, q_len, kv_len = shape
    inputs = make_inputs(batch, 2, 1, q_len, kv_len, 8, torch.float32)
    out = stable_mask_attention(*inputs, gamma=0.1, backend=backend)
    assert out.shape == (batch, 2, q_len, 8)
    for grad, tensor in zip(gradients(out, inputs, torch.ones_like(out)), inputs, strict=True):
        assert grad.shape == tensor.shape
        assert grad.isfinite().all()


@pytest.mark.parametrize("layout", ["expanded", "transposed", "strided"])
def test_memory_layout_does_not_matter(layout):
    base = torch.randn(2, 4, 8, 12)
    tensor = {
        "expanded": base[:1].expand(2, -1, -1, -1),
        "transposed": base.transpose(2, 3).contiguous().transpose(2, 3),
        "strided": torch.randn(2, 4, 8, 24)[..., ::2],
    }[layout]
    compact = tensor.clone(memory_format=torch.contiguous_format)
    out = stable_mask_attention(tensor, tensor, tensor, gamma=0.1, backend="flash")
    expected = stable_mask_attention(compact, compact, compact, gamma=0.1, backend="flash")
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("layout", ["heads first", "tokens first"])
def test_many_rows_in_half_precision(layout):
    """The factor goes over more rows than its buffer holds, a part of the last buffer among them."""
    shape = (2, 300, 4, 8) if layout == "tokens first" else (2, 4, 300, 8)
    tensors = [torch.randn(shape).bfloat16() for _ in range(3)]
    if layout == "tokens first":
        tensors = [tensor.transpose(1, 2) for tensor in tensors]
    sink = torch.randn(4, 1)
    inputs = tuple(tensor.requires_grad_() for tensor in (*tensors, sink))
    compare(
        lambda q, k, v, s, backend: sink_attention(q, k, v, s, backend=backend),
        sink_definition,
        inputs,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scaled_in_a_buffer(dtype):
    """A product of two dtypes would make a converted copy of the whole."""
    mixed = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.aten.mul_.Tensor and args[0].dtype != args[1].dtype:
                mixed.append(args[0].shape)
            return function(*args, **(kwargs or {}))

    tensors = make_inputs(1, 4, 4, 300, 300, 8, dtype)
    with torch.no_grad(), Products():
        sink_attention(*tensors, 0.0, backend="flash")
    assert not mixed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", ["auto", "flash", "blocks", "reference"])
def test_the_defaults_of_torch_change_nothing(dtype, backend):
    query, key, value = make_inputs(2, 4, 2, 300, 300, 16, dtype)

    def attend():
        out = sink_attention(query, key, value, torch.inf, backend=backend)
        with torch.no_grad():
            alone = stable_mask_attention(query, key, value, gamma=0.1, backend=backend)
        return out, alone, *gradients(out + alone, (query, key, value), alone)

    expected = attend()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = attend()
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, others in zip(found, expected, strict=True):
        assert torch.equal(ours, others)


def test_same_inputs_same_bits():
    inputs = make_inputs(2, 4, 2, 130, 130, 32, torch.float32)
    runs = []
    for _ in range(2):
        out = stable_mask_attention(*inputs, gamma=0.01)
        runs.append((out, *gradients(out, inputs, torch.ones_like(out))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize(
    "lengths", [(2, 0, 0), (2, 0, 4), (1, 1, 1), (2, 3, 9), (2, 70, 70), (1, 1100, 1100)]
)
@pytest.mark.parametrize("value_dim", [8, 24])
@pytest.mark.parametrize("tokens_first", [False, True])
def test_without_gradients_the_same_bits(tokens_first, value_dim, lengths, dtype, monkeypatch):
    """A call that nothing watches takes a shorter way to the same kernel; one row may have another."""
    batch, q_len, kv_len = lengths
    inputs = make_inputs(batch, 4, 2, q_len, kv_len, 8, dtype, value_dim)
    if tokens_first:
        inputs = [t.detach().transpose(1, 2).contiguous().transpose(1, 2) for t in inputs]
        inputs = [t.requires_grad_() for t in inputs]
    for sink in (0.0, -torch.inf, torch.inf, torch.randn(4, 1), torch.randn(batch, 1, q_len)):
        watched = sink_attention(*inputs, sink)
        with torch.no_grad():
            alone = sink_attention(*inputs, sink)
            with monkeypatch.context() as patched:
                patched.setattr(native, "LIBRARY", None)
                in_python = sink_attention(*inputs, sink)
        assert alone.dtype == in_python.dtype == dtype
        if q_len == 1:
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(alone, watched, rtol=4 * eps, atol=8 * eps)
            torch.testing.assert_close(in_python, watched, rtol=4 * eps, atol=8 * eps)
        else:
            assert alone.equal(watched)


def test_scale_reaches_the_kernel():
    inputs = make_inputs(1, 2, 2, 9, 9, 8, torch.float64)
    scaled = (inputs[0] * 0.3 * 8**0.5, *inputs[1:])
    torch.testing.assert_close(
        stable_mask_attention(*inputs, gamma=0.1, scale=0.3),
        stable_mask_attention(*scaled, gamma=0.1),
    )


def test_takes_the_place_of_the_stock_attention(monkeypatch):
    """In PyTorch's own layer, which gives the mask, the dropout and causality by position."""
    layer = torch.nn.MultiheadAttention(16, 2, batch_first=True, dtype=torch.float64)
    tokens = torch.randn(2, 5, 16, dtype=torch.float64)
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)

    def attend():
        causal = {"attn_mask": future, "is_causal": True}
        return layer(tokens, tokens, tokens, need_weights=False, **causal)[0]

    expected = attend()
    for gamma, close in ((80.0, True), (0.1, False)):  # a mass of exp(-80), and one that shows
        ours = functools.partial(stable_mask_attention, gamma=gamma)
        monkeypatch.setattr(F, "scaled_dot_product_attention", ours)
        assert torch.allclose(attend(), expected) == close
    with pytest.raises(
        ValueError, match=r"use torch\.nn\.functional\.scaled_dot_product_attention"
    ):
        layer(tokens, tokens, tokens, need_weights=False)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("q_len", [1, 5])
def test_stock_options_say_what_is_so(q_len, kv_heads):
    """A step of decoding is not causal to those who write ``is_causal=q_len > 1``."""
    query, key, value = make_inputs(2, 4, kv_heads, q_len, 5, 8, torch.float64)
    options = {"is_causal": q_len > 1, "enable_gqa": kv_heads < 4}
    stock = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(sink_attention(query, key, value, -torch.inf, **options), stock)
    ours = stable_mask_attention(query, key, value, gamma=0.1, **options)
    without = stable_mask_attention(query, key, value, gamma=0.1)
    torch.testing.assert_close(ours, without, rtol=1e-6, atol=1e-6)  # a mass is kept in float32


def test_learned_gamma_gets_the_gradient_of_the_definition():
    inputs = make_inputs(2, 4, 2, 17, 17, 8, torch.float64)
    gamma = torch.tensor([0.02, 0.1, 0.5, 2.0], dtype=torch.float64, requires_grad=True)
    out = stable_mask_attention(*inputs, gamma=gamma, horizon=20)
    exact = stable_mask_definition(*inputs, gamma=gamma, horizon=20)
    grad = torch.randn_like(out)
    (ours,) = gradients(out, (gamma,), grad)
    (truth,) = gradients(exact, (gamma,), grad)
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)


def test_dropout_keeps_the_mean_and_leaves_evaluation_alone():
    query = torch.zeros(1, 1, 64, 8)
    value = torch.ones(1, 1, 64, 8)
    plain = sink_attention(query, query, value, 0.0)
    draws = torch.stack(
        [sink_attention(query, query, value, 0.0, dropout_p=0.25) for _ in range(400)]
    )
    # Row 63 is a mean of 64 kept-or-dropped weights: its standard error over the draws is known.
    weight = plain[0, 0, 63, 0].item() / 64
    error = weight * (64 * 0.25 / 0.75 / 400) ** 0.5
    assert abs(draws[:, 0, 0, 63, 0].mean().item() - plain[0, 0, 63, 0].item()) < 5 * error
    assert draws[:, 0, 0, 63, 0].std() > 0
