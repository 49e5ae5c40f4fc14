"""The emulated CUDA operators against attention in float64, and what they refuse or read wrongly."""

import itertools

import pytest
import torch

from tests import cuda_contract
from tests.cuda_contract import CARD, ContractError

aten = torch.ops.aten
NAMES = ("flash", "efficient", "cudnn")


@pytest.fixture(autouse=True)
def _card():
    cuda_contract.register()
    CARD.reset((9, 0))
    yield
    CARD.reset((9, 0))


def draw(n, m, heads=4, kv_heads=4, dim=16, dtype=torch.bfloat16, packed=False):
    """Query, key, value and the gradient of the output, in (batch, rows, heads, dim) order in memory."""
    lengths = (n, m, m, n)
    all_heads = (heads, kv_heads, kv_heads, heads)
    tensors = [torch.randn(2, length, h, dim).to(dtype) for length, h in zip(lengths, all_heads)]
    return [tensor[0] if packed else tensor.transpose(1, 2) for tensor in tensors]


def exact(query, key, value, grad, visible, sink=None):
    """Out, lse and the three gradients in float64; a sink logit takes part without a value."""
    leaves = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    wide = [tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in leaves[1:]]
    scores = (leaves[0] @ wide[0].mT * 0.25).masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    total = lse if sink is None else torch.logaddexp(lse, torch.full_like(lse, sink))
    out = torch.exp(scores - total.unsqueeze(-1)) @ wide[1]
    return out, lse, total, torch.autograd.grad(out, leaves, grad.double())


def run(name, query, key, value, causal):
    if name == "efficient":
        query, key, value = (
            t.contiguous().transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)
        )
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, causal, scale=0.25
        )
        return out, lse[..., : query.shape[2]]
    if name == "cudnn":
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, False, scale=0.25
        )
        return out, lse.squeeze(-1)
    out, lse, *_ = aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, causal, False, scale=0.25
    )
    return out, lse


def run_backward(name, grad, query, key, value, out, lse, causal):
    n, m = query.shape[2], key.shape[2]
    state = torch.empty(2, dtype=torch.uint64)
    if name == "efficient":
        lse = torch.nn.functional.pad(lse, (0, -n % 32), value=torch.inf)
        return aten._scaled_dot_product_efficient_attention_backward(
            grad, query, key, value, None, out, lse, state, state, 0.0, [True] * 3 + [False],
            causal, scale=0.25,
        )[:3]  # fmt: skip
    if name == "cudnn":
        return aten._scaled_dot_product_cudnn_attention_backward(
            grad, query, key, value, out, lse.unsqueeze(-1), state, state, None, None, None, n, m,
            0.0, causal, scale=0.25,
        )  # fmt: skip
    return aten._scaled_dot_product_flash_attention_backward(
        grad, query, key, value, out, lse, None, None, n, m, 0.0, causal, state, state, scale=0.25
    )


def near(found, truth):
    # Weights and differences are rounded to the inputs' 8 bits, sums and logarithms to float32.
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(
            ours.double(), theirs, rtol=0, atol=2**-6 * float(theirs.detach().abs().max())
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n", "m", "causal"), [(37, 37, True), (5, 40, False)])
def test_each_operator_is_attention_and_its_backward_takes_the_lse_with_a_sink(name, n, m, causal):
    query, key, value, grad = draw(n, m, kv_heads=4 if name == "efficient" else 2)
    visible = (
        torch.ones(n, m, dtype=torch.bool).tril() if causal else torch.ones(n, m, dtype=torch.bool)
    )
    truth, true_lse, _, _ = exact(query, key, value, grad, visible)
    out, lse = run(name, query, key, value, causal)
    near([out], [truth])
    torch.testing.assert_close(lse.double(), true_lse, rtol=0, atol=1e-4)
    truth, _, total, gradients = exact(query, key, value, grad, visible, sink=0.5)
    out = truth.to(out.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    near(run_backward(name, grad, query, key, value, out, total.float(), causal), gradients)


@pytest.mark.parametrize(("n", "m", "left"), [(24, 24, 5), (8, 30, -1), (8, 30, 6), (1, 30, 6)])
def test_a_window_and_a_chunk_behind_a_cache_are_one_call(n, m, left):
    query, key, value, grad = draw(n, m, kv_heads=2)
    distance = (m - n) + torch.arange(n).unsqueeze(-1) - torch.arange(m)
    visible = (distance >= 0) & ((distance <= left) | (left < 0))
    truth, true_lse, total, gradients = exact(query, key, value, grad, visible, sink=0.5)
    swapped = [tensor.transpose(1, 2) for tensor in (query, key, value)]
    _, lse, *_ = aten._flash_attention_forward(
        *swapped, None, None, n, m, 0.0, True, False, scale=0.25, window_size_left=left,
        window_size_right=0,
    )  # fmt: skip
    torch.testing.assert_close(lse.double(), true_lse, rtol=0, atol=1e-4)
    state = torch.empty(2, dtype=torch.uint64)
    found = aten._flash_attention_backward(
        grad.transpose(1, 2), *swapped, truth.to(query.dtype).transpose(1, 2), total.float(), None, None,
        n, m, 0.0, True, state, state, scale=0.25, window_size_left=left, window_size_right=0,
    )  # fmt: skip
    near([gradient.transpose(1, 2) for gradient in found], gradients)


def test_packed_documents_are_each_on_their_own():
    query, key, value, grad = draw(20, 20, kv_heads=2, packed=True)
    limits = torch.tensor([0, 7, 8, 20], dtype=torch.int32)
    ids = torch.searchsorted(limits[1:].contiguous(), torch.arange(20), right=True)
    visible = (ids.unsqueeze(-1) == ids) & torch.ones(20, 20, dtype=torch.bool).tril()
    dense = [tensor.transpose(0, 1)[None] for tensor in (query, key, value, grad)]
    truth, true_lse, total, gradients = exact(*dense, visible, sink=0.5)
    out, lse, *_ = aten._flash_attention_forward(
        query, key, value, limits, limits, 12, 12, 0.0, True, False, scale=0.25
    )
    assert lse.shape == (4, 20)
    torch.testing.assert_close(lse.double(), true_lse[0], rtol=0, atol=1e-4)
    state = torch.empty(2, dtype=torch.uint64)
    out = truth[0].transpose(0, 1).to(query.dtype)
    found = aten._flash_attention_backward(
        grad, query, key, value, out, total[0].float(), limits, limits, 12, 12, 0.0, True, state,
        state, scale=0.25,
    )  # fmt: skip
    near([gradient.transpose(0, 1)[None] for gradient in found], gradients)


@pytest.mark.parametrize("name", NAMES)
def test_autocast_does_not_reach_into_a_kernel(name):
    query, key, value, _ = draw(24, 24)
    plain = run(name, query, key, value, True)
    with torch.autocast("cpu", torch.bfloat16):
        cast = run(name, query, key, value, True)
    assert cast[1].dtype == torch.float32
    for a, b in zip(plain, cast):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_efficient_backward_reads_out_by_its_own_strides():
    query, key, value, grad = draw(64, 64)
    out, lse = run("efficient", query, key, value, True)
    run_backward("efficient", grad, query, key, value, out, lse, True)
    with pytest.raises(ContractError, match="illegal memory access"):
        run_backward("efficient", grad, query, key, value, out.contiguous(), lse, True)
    # In a larger allocation, other numbers are read.
    larger = torch.zeros(4 * out.numel(), dtype=out.dtype)
    moved = larger[: out.numel()].view(out.shape).copy_(out)
    right = run_backward("efficient", grad, query, key, value, out, lse, True)
    wrong = run_backward("efficient", grad, query, key, value, moved, lse, True)
    assert (right[0] - wrong[0]).abs().max() > 0.1


def test_a_graph_of_cudnn_reads_what_comes_later_by_the_strides_of_the_first():
    query, key, value, grad = draw(64, 64)
    out, lse = run("cudnn", query, key, value, True)
    right = run_backward("cudnn", grad, query, key, value, out, lse, True)
    wrong = run_backward("cudnn", grad.contiguous(), query, key, value, out.contiguous(), lse, True)
    assert (right[0] - wrong[0]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "capability", "change", "words"),
    [
        ("flash", (7, 5), {}, "Ampere"),
        ("flash", (9, 0), {"dtype": torch.float32}, "fp16 and bf16"),
        ("flash", (9, 0), {"dim": 12}, "multiple of 8"),
        ("efficient", (7, 5), {}, "below sm80"),
        ("efficient", (9, 0), {"kv_heads": 2}, "size\\(2\\)"),
        ("cudnn", (9, 0), {"n": 1, "m": 1}, "sequence length 1"),
        ("cudnn", (8, 0), {"dim": 136}, "no more than 128"),
    ],
)
def test_what_a_card_refuses_is_refused(name, capability, change, words):
    CARD.reset(capability)
    sizes = {"n": 8, "m": 8} | change
    query, key, value, _ = draw(**sizes)
    with pytest.raises(ContractError, match=words):
        run(name, query, key, value, True)


@pytest.mark.parametrize("name", NAMES)
def test_misaligned_slices_are_refused(name):
    query, key, value, _ = (
        torch.randn(2, 9, 4, 16).to(torch.bfloat16)[:, 1:].transpose(1, 2) for _ in range(4)
    )
    run(name, query, key, value, True)  # a row is 128 bytes
    shifted = (
        torch.randn(2 * 8 * 4 * 16 + 1).to(torch.bfloat16)[1:].view(2, 8, 4, 16).transpose(1, 2)
    )
    if name == "efficient":
        with pytest.raises(ContractError, match="aligned"):
            aten._scaled_dot_product_efficient_attention(shifted, key, value, None, True, 0.0, True)
    else:
        with pytest.raises(ContractError, match="align"):
            run(name, shifted, key, value, True)


def test_the_schemas_are_those_of_this_pytorch():
    for name, function in cuda_contract.OPERATORS.items():
        schema = getattr(aten, name).default._schema
        given = function.__code__.co_varnames[
            : function.__code__.co_argcount + function.__code__.co_kwonlyargcount
        ]
        positional = [a.name for a in schema.arguments if not a.kwarg_only]
        assert len(positional) == function.__code__.co_argcount, name
        keywords = {a.name for a in schema.arguments if a.kwarg_only}
        # PyTorch 2.9 has none of these two, which we never give.
        assert set(given[len(positional) :]) - {"block_table", "num_splits"} <= keywords, name
        assert keywords <= set(given), name
    assert len(set(itertools.chain(cuda_contract.OPERATORS))) == 8
