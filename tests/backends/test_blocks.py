"""The definition in blocks of rows: equal to the definition at once, in linear memory."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from stablemask import head_decay_rates, sink_attention
from tests.oracle import gradients, make_inputs


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr("stablemask.backends.blocks.ROWS_IN_BLOCK", 8)


def _masks(name, q_len, kv_len):
    """Keyword arguments, of which the floating-point tensors are leaves that need a gradient."""
    if name == "all":
        names = ("bias", "alibi", "window", "documents")
        return {key: mask for each in names for key, mask in _masks(each, q_len, kv_len).items()}
    return {
        "bool": lambda: {"attn_mask": torch.rand(2, 1, q_len, kv_len) > 0.4},
        "padding": lambda: {"attn_mask": (torch.arange(kv_len) > 3).view(1, 1, 1, -1)},
        "bias": lambda: {"attn_mask": torch.randn(2, 4, q_len, kv_len).double().requires_grad_()},
        "bias of keys": lambda: {"attn_mask": torch.randn(4, 1, kv_len).double().requires_grad_()},
        "alibi": lambda: {"alibi_slopes": head_decay_rates(4).double().requires_grad_()},
        "window": lambda: {"window": 5},
        "documents": lambda: {
            "documents": torch.stack([torch.arange(kv_len) // 7, torch.arange(kv_len) // 11])
        },
        "none": dict,
    }[name]()


@pytest.mark.parametrize(
    "mask",
    ["none", "bool", "padding", "bias", "bias of keys", "alibi", "window", "documents", "all"],
)
@pytest.mark.parametrize(("q_len", "kv_len"), [(27, 27), (19, 40), (1, 9)])
@pytest.mark.parametrize("sink_shape", [(4, 1), (2, 4, "q_len")])
def test_outputs_and_every_gradient_equal_the_reference(mask, q_len, kv_len, sink_shape):
    keywords = _masks(mask, q_len, kv_len)
    sink = torch.randn([q_len if size == "q_len" else size for size in sink_shape]).double()
    inputs = (
        *make_inputs(2, 4, 2, q_len, kv_len, 6, torch.float64, value_dim=5),
        sink.requires_grad_(),
        *(t for t in keywords.values() if isinstance(t, torch.Tensor) and t.requires_grad),
    )
    results = []
    for backend in ("blocks", "reference"):
        out = sink_attention(*inputs[:4], backend=backend, **keywords)
        results.append((out, *gradients(out, inputs, torch.ones_like(out).cumsum(-1))))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        out = sink_attention(*inputs[:4], backend="blocks", **keywords)
    assert torch.equal(out, results[0][0])


def test_gradients_in_bfloat16_are_summed_in_float32():
    inputs = make_inputs(1, 2, 1, 130, 130, 8, torch.bfloat16)
    exact_inputs = tuple(t.detach().double().requires_grad_() for t in inputs)
    exact = sink_attention(*exact_inputs, 0.0, backend="reference")
    grad = torch.randn_like(exact).bfloat16()
    truth = (exact, *gradients(exact, exact_inputs, grad))
    distances = {}
    for backend in ("blocks", "reference"):
        out = sink_attention(*inputs, 0.0, backend=backend)
        assert out.dtype == torch.bfloat16
        results = (out, *gradients(out, inputs, grad))
        distances[backend] = [
            (a.double() - b).norm() / b.norm() for a, b in zip(results, truth, strict=True)
        ]
    for ours, reference in zip(distances["blocks"], distances["reference"], strict=True):
        assert ours <= 1.1 * reference


def test_dropout_keeps_the_mean_and_the_right_share_of_weights():
    n, dropout_p, draws = 20, 0.3, 400
    query, key, _ = make_inputs(1, 1, 1, n, n, 4, torch.float64)
    value = torch.eye(n, dtype=torch.float64).view(1, 1, n, n)  # the output is the weights
    with torch.no_grad():
        weights = sink_attention(query, key, value, 0.0, backend="reference")
        dropped = torch.stack([
            sink_attention(query, key, value, 0.0, dropout_p=dropout_p, backend="blocks")
            for _ in range(draws)
        ])  # fmt: skip
    seen = weights > 0
    ratio = (dropped / weights)[:, seen]
    kept = ratio > 0
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / (1 - dropout_p)))
    # Four standard deviations of the mean of so many fair draws.
    spread = 4 * (dropout_p * (1 - dropout_p) / kept.numel()) ** 0.5
    assert abs(kept.double().mean() - (1 - dropout_p)) < spread
    # Each weight is dropped by itself: the variance of a row's sum is the sum of variances.
    variance = (weights**2).sum(-1) * dropout_p / (1 - dropout_p)
    measured = dropped.sum(-1).var(0)
    assert (measured.sum() / variance.sum() - 1).abs() < 0.1


def test_the_gradient_is_of_the_same_dropout_as_the_output():
    inputs = (*make_inputs(1, 2, 1, 19, 19, 3, torch.float64), torch.zeros(2, 1).double())
    inputs[3].requires_grad_()

    def attend(*inputs):
        torch.manual_seed(7)
        return sink_attention(*inputs, dropout_p=0.4, backend="blocks")

    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)
    assert not torch.equal(attend(*inputs), sink_attention(*inputs, backend="blocks"))


def test_one_block_drops_what_the_reference_drops():
    inputs = make_inputs(1, 2, 2, 8, 8, 3, torch.float64)
    results = []
    for backend in ("blocks", "reference"):
        torch.manual_seed(3)
        out = sink_attention(*inputs, 0.0, dropout_p=0.5, backend=backend)
        torch.manual_seed(11)  # the backward must not depend on it
        results.append((out, *gradients(out, inputs, torch.ones_like(out))))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


class PeakMemory(TorchDispatchMode):
    """Most bytes alive at a time among the storages that operations make."""

    def __init__(self):
        super().__init__()
        self.alive, self.bytes, self.peak = set(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage):
        if storage._cdata not in self.alive:
            self.alive.add(storage._cdata)
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, storage, size):
        self.alive.discard(storage)
        self.bytes -= size


@pytest.mark.parametrize("mask", ["none", "alibi", "window", "documents"])
def test_peak_memory_of_training_is_linear_in_length(mask):
    peaks = []
    for length in (256, 1024):
        inputs = make_inputs(2, 4, 2, length, length, 4, torch.float32)
        keywords = _masks(mask, length, length)
        with PeakMemory() as memory:
            out = sink_attention(*inputs, 0.0, dropout_p=0.1, backend="blocks", **keywords)
            out.sum().backward()
        peaks.append(memory.peak)
        assert memory.peak > 0
    assert peaks[1] < 4.4 * peaks[0]


def test_compiles_without_a_graph_break():
    inputs = make_inputs(1, 2, 1, 11, 11, 4, torch.float32)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(*inputs):
        return sink_attention(*inputs, 0.0, window=9, backend="blocks")

    out = compiled(*inputs)
    expected = sink_attention(*inputs, 0.0, window=9, backend="blocks")
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    for ours, eager in zip(
        gradients(out, inputs, grad), gradients(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("name", ["sink_logits", "attn_mask", "alibi_slopes"])
def test_gradients_of_what_blocks_share_are_summed_in_float32(name):
    """In bfloat16 a small part of a block is lost beside a large one before it, however many there are."""
    inputs = make_inputs(1, 1, 1, 256, 256, 4, torch.float64)[:3]
    learned = {
        "sink_logits": torch.full((1, 1), 8.0),
        "attn_mask": torch.zeros(1, 1, 1, 256),
        "alibi_slopes": torch.full((1,), 0.125),
    }
    grad = torch.full((1, 1, 256, 4), 0.002).double()
    grad[:, :, -8:] = 1.0

    def gradient(backend, dtype):
        query, key, value = (t.detach().to(dtype) * 0 + 1 for t in inputs)
        leaves = {each: leaf.to(dtype).requires_grad_() for each, leaf in learned.items()}
        out = sink_attention(query, key, value, **leaves, backend=backend)
        return torch.autograd.grad(out, leaves[name], grad.to(dtype))[0]

    exact = gradient("reference", torch.float64)
    error, dense = (
        (gradient(backend, torch.bfloat16).double() - exact).abs().max()
        for backend in ("blocks", "reference")
    )
    rounding = torch.finfo(torch.bfloat16).eps / 2 * exact.abs().max()
    assert error <= max(2 * dense, rounding)
