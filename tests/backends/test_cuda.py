"""CUDA's paths: on a GPU where there is one, else through the contract of its operators on CPU tensors."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stablemask import (
    head_decay_rates,
    merge_attention,
    partial_attention,
    sink_attention,
    stable_mask_attention,
)
from stablemask.backends import hardware
from stablemask.backends.choice import choose
from stablemask.backends.stock.flash import kernel_for
from stablemask.call import Call
from stablemask.masks import NO_MASKS, Masks
from tests import marks
from tests.cuda_contract import CARD
from tests.oracle import gradients, sink_definition

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)


def serves(backend, dtype, device):
    if dtype == torch.bfloat16 and hardware.capability(device) < (8, 0):
        return False
    return backend == "flash" or (dtype in HALF and hardware.capability(device) >= (8, 0))


def masked(mask, rows, keys, device):
    """Keywords of a mask, and the same as ``visible`` and ``bias`` of the definition."""
    distance = torch.arange(keys - rows, keys).unsqueeze(-1) - torch.arange(keys)
    if mask == "padding":
        visible = torch.ones(2, 1, 1, keys, dtype=torch.bool)
        visible[0, ..., : keys // 3] = False
        return {"attn_mask": visible.to(device)}, visible, None
    if mask == "alibi":
        slopes = head_decay_rates(4)
        bias = -slopes.double().view(1, 4, 1, 1) * distance
        return {"alibi_slopes": slopes.to(device)}, None, bias
    if mask == "window":
        return {"window": 20}, distance < 20, None
    if mask in ("documents", "scattered"):  # the second has a document in two pieces
        documents = torch.arange(keys).expand(2, -1) // torch.tensor([[30], [70]])
        if mask == "scattered":
            documents = documents % 2
        own = documents[:, keys - rows :, None] == documents[:, None]
        keywords = {"documents": documents.to(device)}
        if mask == "documents":
            keywords["window"] = 25
            own = own & (distance < 25)
        return keywords, own.unsqueeze(1), None
    return {}, None, None


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("mask", ["none", "padding", "alibi", "window", "documents", "scattered"])
@pytest.mark.parametrize(
    ("rows", "keys"), [(1, 1), (7, 7), (130, 130), (1, 63), (40, 130), (12, 13)]
)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_equals_the_definition(device, backend, dtype, rows, keys, mask, kv_heads):
    if not serves(backend, dtype, device):
        query = torch.randn(2, 4, rows, 64, device=device, dtype=dtype)
        with pytest.raises(ValueError, match=r"capability|takes float16"):
            sink_attention(query, query, query, 0.0, backend=backend)
        return
    shapes = [(2, 4, rows, 64), (2, kv_heads, keys, 64), (2, kv_heads, keys, 64), (4, 1)]
    exact_inputs = tuple(torch.randn(s).to(dtype).double().requires_grad_() for s in shapes)
    inputs = tuple(t.detach().to(device, dtype).requires_grad_() for t in exact_inputs)
    keywords, visible, bias = masked(mask, rows, keys, device)
    if backend == "cudnn" and (
        mask not in ("none", "padding") or keys == 1 or rows not in (1, keys)
    ):
        with pytest.raises(ValueError, match="cuDNN"):
            sink_attention(*inputs, backend=backend, **keywords)
        return
    exact = sink_definition(*exact_inputs, visible=visible, bias=bias)
    grad = torch.randn_like(exact).to(dtype).double()
    truth = (exact, *gradients(exact, exact_inputs, grad))
    results = {}
    for name in (backend, "reference"):
        out = sink_attention(*inputs, backend=name, **keywords)
        results[name] = (out, *gradients(out, inputs, grad.to(device)))
    term = max((grad * exact).abs().sum(-1).max(), 1)
    for ours, dense, expected in zip(*(results[n] for n in results), truth, strict=True):
        assert ours.isfinite().all()
        roundings = 4 * torch.finfo(dtype).eps * max(term, expected.abs().max())
        allowed = 2 * (dense.cpu().double() - expected).abs().max() + roundings
        assert (ours.cpu().double() - expected).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_blind_row_is_zero(device, dtype):
    if not serves("flash", dtype, device):
        pytest.skip("bfloat16 needs compute capability 8.0")
    query = torch.randn(1, 2, 9, 64, device=device, dtype=dtype, requires_grad=True)
    mask = (torch.arange(9, device=device) >= 4).view(1, 1, 1, 9)
    for sink in (0.0, float("-inf")):
        out = sink_attention(query, query, query, sink, attn_mask=mask)
        assert (out[:, :, :4] == 0).all()
        (grad,) = gradients(out, (query,), torch.randn_like(out))
        assert grad.isfinite().all()
        assert (grad[:, :, :4] == 0).all()


# Of a cut from a wider projection, from between 16 bytes, and in another order than the output.
@pytest.mark.parametrize("layout", ["wide", "misaligned", "narrow rows", "heads first"])
@pytest.mark.parametrize("backend", ["flash", "cudnn"])
@pytest.mark.parametrize("mask", ["none", "padding"])
def test_however_tensors_lie_in_memory(device, backend, layout, mask):
    if not serves(backend, torch.float16, device):
        pytest.skip("cuDNN needs compute capability 8.0")

    def draw():
        made = torch.randn(2, 24, 4, 40).to(device, torch.float16)
        if layout == "wide":
            made = made[..., 8:24]
        elif layout == "misaligned":
            made = made.flatten()[3 : 3 + 2 * 24 * 4 * 16].view(2, 24, 4, 16)
        elif layout == "narrow rows":
            made = made[..., :36].contiguous()[..., 2:18]
        else:
            made = made[..., :16].transpose(1, 2).contiguous().transpose(1, 2)
        return made.detach().requires_grad_()

    leaves = (draw(), draw(), draw())
    keywords, visible, _ = masked(mask, 24, 24, device)
    out = sink_attention(*(t.transpose(1, 2) for t in leaves), 0.5, backend=backend, **keywords)
    grad = torch.randn(2, 4, 24, 16).to(torch.float16)
    exact_leaves = tuple(t.detach().cpu().double().requires_grad_() for t in leaves)
    sink = torch.full((1, 1), 0.5, dtype=torch.float64)
    exact = sink_definition(*(t.transpose(1, 2) for t in exact_leaves), sink, visible=visible)
    truth = (exact, *gradients(exact, exact_leaves, grad))
    # Twice: the second call finds what the first has cached.
    for given in (grad, grad.transpose(1, 2).contiguous().transpose(1, 2)):
        found = torch.autograd.grad(out, leaves, given.to(device), retain_graph=True)
        for ours, expected in zip((out, *found), truth, strict=True):
            allowed = 8 * torch.finfo(torch.float16).eps * max(1, expected.abs().max())
            assert (ours.detach().cpu().double() - expected).abs().max() <= allowed


def test_a_stock_call_before_ours_leaves_it_no_wrong_graph(device):
    """Its gradient lies otherwise than the query, and PyTorch up to 2.13 finds its graph for ours."""
    if not serves("cudnn", torch.float16, device):
        pytest.skip("cuDNN needs compute capability 8.0")
    made = [torch.randn(2, 24, 4, 16).to(device, torch.float16) for _ in range(3)]
    query, key, value = (tensor.transpose(1, 2) for tensor in made)
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
        query, key, value, None, True, 0.0, True, False, scale=0.25
    )
    grad = torch.randn(2, 4, 24, 16).to(device, torch.float16)
    state = torch.zeros((), dtype=torch.int64, device=device)
    aten._scaled_dot_product_cudnn_attention_backward(
        grad, query, key, value, out.contiguous(), lse, state, state, None, None, None, 24, 24, 0.0, True,
        scale=0.25,
    )  # fmt: skip
    leaves = tuple(tensor.detach().requires_grad_() for tensor in (query, key, value))
    ours = gradients(sink_attention(*leaves, 0.5, backend="cudnn"), leaves, grad)
    exact_leaves = tuple(t.detach().cpu().double().requires_grad_() for t in leaves)
    exact = sink_definition(*exact_leaves, torch.full((1, 1), 0.5, dtype=torch.float64))
    for found, expected in zip(ours, gradients(exact, exact_leaves, grad.cpu()), strict=True):
        allowed = 8 * torch.finfo(torch.float16).eps * max(1, expected.abs().max())
        assert (found.cpu().double() - expected).abs().max() <= allowed


# The widest heads too: a gradient of lse takes one column more.
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize(
    ("masks", "head_dim"),
    [({}, 64), ({"window": 20}, 64), ({"alibi_slopes": head_decay_rates(4)}, 64), ({}, 256), ({"window": 20}, 256)],
)  # fmt: skip
def test_parts_and_their_merge(device, dtype, masks, head_dim):
    if not serves("flash", dtype, device):
        pytest.skip("bfloat16 needs compute capability 8.0")
    shapes = [(2, 4, 96, head_dim)] * 3 + [(4, 1)]
    leaves = tuple(torch.randn(s).to(device, dtype).requires_grad_() for s in shapes)
    query, key, value, sink = leaves
    _, visible, bias = masked(next(iter(masks), "none").removesuffix("_slopes"), 96, 96, device)
    on_device = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in masks.items()}
    rows, ranges = slice(64, 96), [slice(0, 64), slice(64, 96)]
    parts = [
        partial_attention(
            query[:, :, rows], key[:, :, r], value[:, :, r], past=rows.start - r.start, **on_device
        )
        for r in ranges
    ]
    out, _ = merge_attention(parts, sink)
    exact_leaves = tuple(t.detach().cpu().double().requires_grad_() for t in leaves)
    exact = sink_definition(*exact_leaves, visible=visible, bias=bias)[:, :, rows]
    grad = torch.randn_like(exact).to(dtype)
    ours = (out, *gradients(out, leaves, grad.to(device)))
    truth = (exact, *gradients(exact, exact_leaves, grad))
    for a, b in zip(ours, truth, strict=True):
        # Each part is rounded to the dtype before the merge, and its gradient after.
        allowed = 8 * max(torch.finfo(dtype).eps, 1e-6) * max(1, b.abs().max())
        assert (a.cpu().double() - b).abs().max() <= allowed


# In one call: no tiles, no bias.
@pytest.mark.parametrize(
    ("rows", "keys", "mask", "operator"),
    [
        (96, 96, "window", "window"),
        (8, 96, "none", "window"),
        (8, 96, "window", "window"),
        (1, 96, "window", "window"),
        (96, 96, "documents", "packed"),
    ],
)
def test_windows_documents_and_chunks_are_one_call_each_way(device, rows, keys, mask, operator):
    if device.type == "cuda" or CARD.capability < (8, 0):
        pytest.skip("counts the operators of the emulation, from compute capability 8.0 on")
    query = torch.randn(2, 4, rows, 64, dtype=torch.bfloat16, requires_grad=True)
    key = torch.randn(2, 2, keys, 64, dtype=torch.bfloat16)
    keywords, _, _ = masked(mask, rows, keys, device)
    sink_attention(query, key, key, 0.0, **keywords).sum().backward()
    names = [name for name, *_ in CARD.calls]
    assert names == [f"flash {operator} forward", f"flash {operator} backward"]


@pytest.mark.parametrize("documents", [None, torch.arange(40) // 15])
def test_a_window_beyond_32_bits_hides_nothing(device, documents):
    query = torch.randn(2, 4, 40, 64, device=device, dtype=torch.float16)
    documents = documents if documents is None else documents.to(device)
    whole, windowed = (
        sink_attention(query, query, query, 0.0, window=window, documents=documents)
        for window in (None, 2**32 + 6)
    )
    torch.testing.assert_close(windowed, whole)


def test_packed_documents_are_read_whatever_the_default_device(device):
    query = torch.randn(2, 4, 40, 64, device=device, dtype=torch.float16)
    documents = (torch.arange(40) // 15).to(device)
    expected = sink_attention(query, query, query, 0.0, documents=documents)
    with torch.device("meta"):
        found = sink_attention(query, query, query, 0.0, documents=documents)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["flash", "cudnn"])
def test_a_query_may_be_expanded(device, name, axis):
    if not serves(name, torch.float16, device):
        pytest.skip("cuDNN needs compute capability 8.0")
    shape = [2, 4, 40, 64]
    shape[axis] = 1
    once = torch.randn(shape, device=device, dtype=torch.float16)
    key, value = (torch.randn(2, 2, 40, 64, device=device, dtype=torch.float16) for _ in range(2))
    sink = torch.zeros(4, 1, device=device, requires_grad=True)
    expanded = once.expand(2, 4, 40, 64)
    with torch.no_grad():
        found = sink_attention(expanded, key, value, sink, backend=name)
    expected = sink_attention(expanded.contiguous(), key, value, sink, backend=name)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(sink_attention(expanded, key, value, sink, backend=name), expected)


class _Precise(TorchDispatchMode):
    """The float32 tensors of at least a size that are made."""

    def __init__(self, least):
        self.least, self.found = least, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in [out] if isinstance(out, torch.Tensor) else []:
            if made.dtype == torch.float32 and made.numel() >= self.least:
                self.found.add(made.data_ptr())
        return out


@pytest.mark.parametrize(("dtype", "buffers"), [(torch.bfloat16, 0), (torch.float16, 1)])
def test_a_learned_sink_costs_no_float32_copies(device, dtype, buffers):
    if not serves("flash", dtype, device):
        pytest.skip("bfloat16 needs compute capability 8.0")
    query = torch.randn(2, 4, 48, 64, device=device, dtype=dtype)
    sink = torch.randn(4, 1, device=device, requires_grad=True)
    out = sink_attention(query, query, query, sink, backend="flash")
    with _Precise(out.numel()) as made:
        out.backward(torch.randn_like(out))
    assert len(made.found) == buffers
    assert sink.grad.isfinite().all()


def test_kernels_are_chosen_by_the_device(device):
    capability = hardware.capability(device)
    half = torch.empty(1, 1, 2, 8, dtype=torch.float16, device=device)
    assert kernel_for(half, NO_MASKS) == ("cuda" if capability >= (8, 0) else "efficient")
    assert kernel_for(half, Masks(attn_mask=half)) == "efficient"
    assert kernel_for(half.float(), NO_MASKS) == "efficient"


@pytest.mark.parametrize(
    ("rows", "keys", "masks"),
    [(64, 64, {}), (1, 64, {}), (8, 64, {}), (64, 64, {"window": 9})],
)
def test_auto_follows_stock_attention(device, rows, keys, masks):
    capability = hardware.capability(device)
    query = torch.empty(1, 2, rows, 64, dtype=torch.float16, device=device)
    key = torch.empty(1, 2, keys, 64, dtype=torch.float16, device=device)
    sink = torch.zeros(1, 1, 1, device=device)
    call = Call(query, key, key, sink, Masks(**masks) if masks else NO_MASKS, 0.0, 0.125)
    prefers_cudnn = capability in ((9, 0), (10, 0)) and (hardware.cudnn_version() or 0) > 91500
    expected = "cudnn" if prefers_cudnn and rows == keys and not masks else "flash"
    assert choose(call, "auto") is choose(call, expected)


def test_what_cudnn_cannot_do_is_said(device, monkeypatch):
    if device.type == "cuda" or CARD.capability < (8, 0):
        pytest.skip("of the emulation, from compute capability 8.0 on")

    def attend(dim, *, training=False):
        query = torch.randn(1, 2, 8, dim, dtype=torch.float16, requires_grad=training)
        return sink_attention(query, query, query, 0.0, backend="cudnn")

    for version in (91000, 90900):
        monkeypatch.setattr(hardware, "cudnn_version", lambda version=version: version)
        if version == 91000 and CARD.capability == (9, 0):
            assert attend(136).isfinite().all()
            continue
        with pytest.raises(ValueError, match="head_dim is above 128"):
            attend(136)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert attend(128).isfinite().all()
    with pytest.raises(ValueError, match="backward is not deterministic"):
        attend(128, training=True)


class TestOnACardAlone:
    pytestmark = marks.gpu

    def test_compiles_without_a_graph_break(self):
        query = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        compiled = torch.compile(
            lambda q: stable_mask_attention(q, q, q, gamma=0.1), fullgraph=True
        )
        torch.testing.assert_close(
            compiled(query), stable_mask_attention(query, query, query, gamma=0.1)
        )

    @pytest.mark.parametrize("masks", [{}, {"window": 40}, {"documents": 50}])
    def test_a_cuda_graph_replays_it_forward_and_backward(self, masks):
        if "documents" in masks:
            masks = {"documents": torch.arange(128, device="cuda") // masks["documents"]}
        shape = (2, 4, 128, 64)

        def attend(query, key, value):
            return stable_mask_attention(query, key, value, gamma=0.01, backend="flash", **masks)

        def inputs():
            tensors = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
            return tuple(tensor.requires_grad_() for tensor in tensors)

        graphed = torch.cuda.make_graphed_callables(attend, inputs())
        for _ in range(2):
            tensors = inputs()
            out, expected = graphed(*tensors), attend(*tensors)
            torch.testing.assert_close(out, expected, rtol=0, atol=0)
            grad = torch.randn_like(out)
            for ours, eager in zip(
                gradients(out, tensors, grad), gradients(expected, tensors, grad), strict=True
            ):
                torch.testing.assert_close(ours, eager)

    def test_numbers_that_are_read_later(self):
        numbers = torch.arange(3, device="cuda")
        assert hardware.read_later(numbers.float() / 2)() == [0.0, 0.5, 1.0]

    def test_length_is_linear_in_memory(self):
        query = torch.randn(1, 8, 16384, 64, device="cuda", dtype=torch.bfloat16)
        query.requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        stable_mask_attention(query, query, query, gamma=1e-4).sum().backward()
        one_score_matrix = 16384 * 16384 * 2
        assert torch.cuda.max_memory_allocated() - before < one_score_matrix
