"""The stock kernels: the CPU's backward in either precision, the shapes of CUDA's on the meta device
anywhere, and their numbers where there is a GPU."""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from stablemask import (
    head_decay_rates,
    merge_attention,
    partial_attention,
    sink_attention,
    stable_mask_attention,
)
from stablemask.backends import kernels
from stablemask.backends.flash import kernel_for
from stablemask.backends.kernels import KERNELS
from stablemask.processor import Units
from tests import marks
from tests.oracle import (
    assert_no_further_than_twice,
    doubled,
    gradients,
    make_inputs,
    sink_definition,
)


# The flash kernel takes no bias; calls that have one go to the efficient kernel.
@pytest.mark.parametrize(
    ("name", "padding"),
    [("cuda", False), *itertools.product(["cudnn", "efficient"], [False, True])],
)
@pytest.mark.parametrize(("rows", "keys", "causal"), [(37, 37, True), (5, 40, False)])
def test_shapes_of_the_cuda_kernels(name, padding, rows, keys, causal):
    query = torch.empty(2, rows, 4, 16, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    key = torch.empty(2, keys, 2, 16, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    bias = key.new_empty(2, 1, 1, keys) if padding else None
    kernel = KERNELS[name]
    out, lse = kernel.forward(query, key, key, bias, causal, 0.25)
    assert out.shape == query.shape
    assert lse.shape == (2, 4, rows)
    assert lse.dtype == torch.float32
    grads = kernel.backward(out, query, key, key, out, lse, bias, causal, 0.25)
    assert [grad.shape for grad in grads] == [query.shape, key.shape, key.shape]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "meta"}, "no stock flash kernel"),
        ({"device": "cuda", "dtype": torch.float64}, "float64"),
        ({"device": "cuda", "dim": 257}, "head_dim"),
    ],
)
def test_flash_says_what_it_cannot_do(changes, reason):
    with FakeTensorMode():
        query = torch.empty(
            1, 1, 4, changes.get("dim", 8),
            dtype=changes.get("dtype", torch.float32), device=changes["device"],
        )  # fmt: skip
        sink = torch.zeros(1, 1, device=changes["device"])
        with pytest.raises(ValueError, match=reason):
            sink_attention(query, query, query, sink, backend="flash")


def test_every_case_on_cuda_has_a_kernel():
    assert kernel_for("cuda", torch.bfloat16, False) == "cuda"
    assert kernel_for("cuda", torch.float16, False) == "cuda"
    assert kernel_for("cuda", torch.bfloat16, True) == "efficient"
    assert kernel_for("cuda", torch.float32, False) == "efficient"
    assert kernel_for("cpu", torch.float32, True) == "cpu"


def test_cudnn_says_what_it_cannot_do():
    with FakeTensorMode():
        query = torch.empty(1, 1, 4, 8, device="cuda")
        sink = torch.zeros(1, 1, device="cuda")
        with pytest.raises(ValueError, match="float16 and bfloat16"):
            sink_attention(query, query, query, sink, backend="cudnn")


# One of the two key heads of two sequences at a time, a sequence, all; None: in half precision.
@pytest.mark.parametrize("threads", [None, 1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masks", [{}, {"window": 40}, {"alibi_slopes": head_decay_rates(4)}])
def test_backward_of_half_precision_on_the_cpu(masks, dtype, threads, monkeypatch):
    monkeypatch.setattr(kernels, "_faster_in_float32", lambda query, key: threads is not None)
    monkeypatch.setattr(kernels, "_SLICE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    inputs = make_inputs(2, 4, 2, 96, 96, 32, dtype)
    exact_inputs = doubled(inputs)
    distance = torch.arange(96).unsqueeze(-1) - torch.arange(96)
    visible = distance < masks.get("window", 96)
    slopes = masks.get("alibi_slopes", torch.zeros(4)).double()
    bias = -slopes.view(4, 1, 1) * distance
    exact = sink_definition(
        *exact_inputs, torch.zeros(1, 1, dtype=torch.float64), visible=visible, bias=bias
    )
    grad = torch.randn_like(exact).to(dtype)
    truth = gradients(exact, exact_inputs, grad)
    ours, dense = (
        gradients(sink_attention(*inputs, 0.0, backend=backend, **masks), inputs, grad)
        for backend in ("flash", "reference")
    )
    assert [gradient.dtype for gradient in ours] == [dtype] * 3
    assert_no_further_than_twice(ours, dense, truth, (grad * exact).abs().sum(-1).max())


def test_when_the_backward_of_half_precision_is_in_float32(monkeypatch):
    def converts(length, head_dim, dtype=torch.bfloat16, *, amx=False, dot_products=False):
        monkeypatch.setattr(kernels, "UNITS", Units(amx, dot_products))
        query = torch.empty(1, 1, length, head_dim, dtype=dtype)
        return kernels._faster_in_float32(query, query)

    half = (torch.bfloat16, torch.float16)
    for dtype in half:
        assert converts(256, 64, dtype, amx=True, dot_products=True)
        assert not converts(257, 64, dtype, amx=True, dot_products=True)
        assert converts(4096, 64, dtype)
    # A CPU that multiplies bfloat16 need not multiply float16.
    assert [converts(128, 64, dtype, dot_products=True) for dtype in half] == [True, True]
    assert [converts(129, 64, dtype, dot_products=True) for dtype in half] == [False, True]
    for dtype in (torch.float32, torch.float64):
        assert not converts(16, 64, dtype)


class TestOnGpu:
    pytestmark = marks.gpu

    @pytest.mark.parametrize(
        ("backend", "dtype"),
        [
            ("flash", torch.float32),  # cuDNN takes half precision only
            *itertools.product(["flash", "cudnn"], [torch.bfloat16, torch.float16]),
        ],
    )
    @pytest.mark.parametrize(("rows", "keys"), [(1, 1), (7, 7), (257, 257), (1, 63), (40, 257)])
    @pytest.mark.parametrize("mask", ["none", "padding", "alibi"])
    @pytest.mark.parametrize("kv_heads", [1, 4])
    def test_equals_the_definition(self, backend, dtype, rows, keys, mask, kv_heads):
        shapes = [(2, 4, rows, 64), (2, kv_heads, keys, 64), (2, kv_heads, keys, 64), (4, 1)]
        exact_inputs = [torch.randn(shape).to(dtype).double() for shape in shapes]
        exact_inputs = tuple(t.requires_grad_() for t in exact_inputs)
        inputs = tuple(t.detach().to("cuda", dtype).requires_grad_() for t in exact_inputs)
        keywords, visible, bias = {}, None, None
        if mask == "padding":
            visible = torch.ones(2, 1, 1, keys, dtype=torch.bool)
            visible[0, ..., : keys // 3] = False
            keywords["attn_mask"] = visible.cuda()
        elif mask == "alibi":
            slopes = head_decay_rates(4)
            keywords["alibi_slopes"] = slopes.cuda()
            distance = torch.arange(keys - rows, keys).unsqueeze(-1) - torch.arange(keys)
            bias = -slopes.double().view(1, 4, 1, 1) * distance

        exact = sink_definition(*exact_inputs, visible=visible, bias=bias)
        grad = torch.randn_like(exact).to(dtype).double()
        truth = (exact, *gradients(exact, exact_inputs, grad))
        results = {}
        for name in (backend, "reference"):
            out = sink_attention(*inputs, backend=name, **keywords)
            results[name] = (out, *gradients(out, inputs, grad.cuda()))
        term = max((grad * exact).abs().sum(-1).max(), 1)
        for ours, dense, expected in zip(*(results[n] for n in results), truth, strict=True):
            assert ours.isfinite().all()
            roundings = 4 * torch.finfo(dtype).eps * max(term, expected.abs().max())
            allowed = 2 * (dense.cpu().double() - expected).abs().max() + roundings
            assert (ours.cpu().double() - expected).abs().max() <= allowed

    def test_a_blind_row_is_zero(self):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            query = torch.randn(1, 2, 9, 64, device="cuda", dtype=dtype, requires_grad=True)
            mask = (torch.arange(9, device="cuda") >= 4).view(1, 1, 1, 9)
            for sink in (0.0, float("-inf")):
                out = sink_attention(query, query, query, sink, attn_mask=mask)
                assert (out[:, :, :4] == 0).all()
                (grad,) = gradients(out, (query,), torch.randn_like(out))
                assert grad.isfinite().all()
                assert (grad[:, :, :4] == 0).all()

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

    def test_parts_and_their_merge(self):
        query, key, value = (
            torch.randn(2, 4, 96, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            for _ in range(3)
        )
        sink = torch.randn(4, 1, device="cuda", requires_grad=True)
        rows, ranges = slice(64, 96), [slice(0, 64), slice(64, 96)]
        parts = [
            partial_attention(
                query[:, :, rows], key[:, :, r], value[:, :, r], past=rows.start - r.start
            )
            for r in ranges
        ]
        out, _ = merge_attention(parts, sink)
        leaves = (query, key, value, sink)
        exact_leaves = tuple(t.detach().cpu().double().requires_grad_() for t in leaves)
        exact = sink_definition(*exact_leaves)[:, :, rows]
        grad = torch.randn_like(exact).bfloat16()
        ours = (out, *gradients(out, leaves, grad.cuda()))
        truth = (exact, *gradients(exact, exact_leaves, grad))
        for a, b in zip(ours, truth, strict=True):
            # Each part is rounded to bfloat16 before the merge, and its gradient after.
            allowed = 8 * torch.finfo(torch.bfloat16).eps * max(1, b.abs().max())
            assert (a.cpu().double() - b).abs().max() <= allowed

    def test_length_is_linear_in_memory(self):
        query = torch.randn(1, 8, 16384, 64, device="cuda", dtype=torch.bfloat16)
        query.requires_grad_()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        stable_mask_attention(query, query, query, gamma=1e-4).sum().backward()
        one_score_matrix = 16384 * 16384 * 2
        assert torch.cuda.max_memory_allocated() - before < one_score_matrix
