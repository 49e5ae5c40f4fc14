"""The flash-attn package: stand-ins with its signatures, layouts and arithmetic, and the real one.

A stand-in computes what the package's kernels do, dense and in the dtype it is given: the forward returns
lse, the backward rebuilds ``p = exp(s - lse)`` and ``D = rowsum(dout * out)`` from what it is handed.
"""

from types import SimpleNamespace

import pytest
import torch

from stablemask import head_decay_rates, sink_attention
from stablemask.backends import flash_attn, hardware, reference
from stablemask.call import Call
from stablemask.masks import Masks
from tests import marks
from tests.oracle import gradients, make_inputs


def _scores(q, k, softmax_scale, causal, window_size_left, window_size_right, alibi_slopes):
    """Scaled scores in the kernel's conventions, (B, H, n, m), hidden ones -inf."""
    assert causal
    n, m = q.shape[1], k.shape[1]
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * softmax_scale
    row, key = torch.arange(m - n, m).unsqueeze(-1), torch.arange(m)
    if alibi_slopes is not None:
        assert alibi_slopes.dtype == torch.float32
        slopes = alibi_slopes.view(-1, 1, 1)
        # Plain causal, the kernel adds the same to every row, and its lse is that of those scores.
        scores = scores + (slopes * key if window_size_left < 0 else -slopes * (row - key).abs())
    hidden = key > row + window_size_right
    if 0 <= window_size_left < m:
        hidden = hidden | (key < row - window_size_left)
    # The kernels hide before they scale.
    return scores.masked_fill(hidden, -torch.inf * softmax_scale)


def _check_aligned(*tensors):
    """Read 16 bytes at a time, and by descriptors that ask for no less."""
    for tensor in tensors:
        places = [tensor.storage_offset(), *tensor.stride()[:-1]]
        assert not any(place * tensor.itemsize % 16 for place in places)


def _forward(q, k, v, *mask):
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    _check_aligned(q, k, v)
    assert q.shape[-1] % 8 == 0
    scores = _scores(q, k, *mask)
    lse = scores.logsumexp(-1)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    out = torch.einsum("bhij,bjhd->bihd", (scores - lse.unsqueeze(-1)).exp(), v)
    return out, lse.to(_lse_dtype(q))


def _lse_dtype(q):
    return q.dtype if q.dtype == torch.float64 else torch.float32


def _backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, *mask):
    assert softmax_lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert softmax_lse.dtype == _lse_dtype(q)
    assert softmax_lse.is_contiguous()
    _check_aligned(dout, q, k, v, out)
    groups = q.shape[2] // k.shape[2]
    wide_k, wide_v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
    p = (_scores(q, k, softmax_scale, *mask) - softmax_lse.unsqueeze(-1)).exp()
    total = (dout * out).sum(-1).transpose(1, 2).unsqueeze(-1)
    ds = p * (torch.einsum("bihd,bjhd->bhij", dout, wide_v) - total) * softmax_scale
    dq.copy_(torch.einsum("bhij,bjhd->bihd", ds, wide_k))
    for grad, weights, rows in ((dk, ds, q), (dv, p, dout)):
        wide = torch.einsum("bhij,bihd->bjhd", weights, rows)
        grad.copy_(wide.unflatten(2, (-1, groups)).sum(3))


def _fa2_forward(
    q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
    alibi_slopes, return_softmax,
):  # fmt: skip
    """flash_attn 2.8: flash_attn.flash_attn_interface._flash_attn_forward."""
    assert (dropout_p, softcap, return_softmax) == (0.0, 0.0, False)
    mask = (softmax_scale, causal, window_size_left, window_size_right, alibi_slopes)
    return *_forward(q, k, v, *mask), torch.empty(0), torch.empty(2, dtype=torch.int64)


def _fa2_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
    window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    """flash_attn 2.8: flash_attn.flash_attn_interface._flash_attn_backward."""
    assert (dropout_p, softcap) == (0.0, 0.0)
    mask = (softmax_scale, causal, window_size_left, window_size_right, alibi_slopes)
    _backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, *mask)
    return torch.empty(0)


def _fa3_forward(
    q, k, v, k_new=None, v_new=None, qv=None, out_=None, cu_seqlens_q=None, cu_seqlens_k=None,
    cu_seqlens_k_new=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
    page_table=None, kv_batch_idx=None, leftpad_k=None, rotary_cos=None, rotary_sin=None,
    seqlens_rotary=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
    causal=False, window_size_left=-1, window_size_right=-1, attention_chunk=0, softcap=0.0,
    rotary_interleaved=True, scheduler_metadata=None, num_splits=1, pack_gqa=None, sm_margin=0,
):  # fmt: skip
    """FA3, from October 2025: flash_attn_interface._flash_attn_forward."""
    out, lse = _forward(q, k, v, softmax_scale, causal, window_size_left, window_size_right, None)
    return out, lse, torch.empty(0), torch.empty(0)


def _fa3_backward(
    dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None,
    sequed_k=None, max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None,
    softmax_scale=None, is_causal=False, window_size_left=-1, window_size_right=-1, softcap=0.0,
    deterministic=False, sm_margin=0,
):  # fmt: skip
    """FA3, from October 2025: flash_attn_interface._flash_attn_backward."""
    mask = (softmax_scale, is_causal, window_size_left, window_size_right, None)
    _backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, *mask)
    return torch.empty(0)


def _fa4_mask(softmax_scale, causal, softcap, left, right):
    """As `_resolve_causal_local_window` has it: causality is a window without a right side."""
    assert causal
    assert softcap in (None, 0.0)
    assert right is None
    assert left is None or left >= 0  # a negative one would hide a row's own key
    return softmax_scale, causal, -1 if left is None else left, 0, None


def _fa4_checks(q, k, v, learnable_sink):
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert q.shape[-1] % 8 == 0
    if learnable_sink is not None:
        assert learnable_sink.shape == (q.shape[2],)
        assert learnable_sink.dtype == _lse_dtype(q)


def _fa4_forward(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
    max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None,
    causal=False, softcap=None, window_size_left=None, window_size_right=None, learnable_sink=None,
    tile_mn=None, mma_pv_is_rs=None, intra_wg_overlap=None, num_threads=384, num_splits=1,
    pack_gqa=None, _arch=None, score_mod=None, mask_mod=None, block_sparse_tensors=None,
    return_lse=False, out=None, lse=None,
):  # fmt: skip
    """flash_attn_4 4.0.0b36: flash_attn.cute.interface._flash_attn_fwd."""
    _fa4_checks(q, k, v, learnable_sink)
    mask = _fa4_mask(softmax_scale, causal, softcap, window_size_left, window_size_right)
    out, lse = _forward(q, k, v, *mask)
    if learnable_sink is not None:  # one more column of the softmax, in the lse too
        total = torch.logaddexp(lse, learnable_sink[:, None])
        out, lse = out * (lse - total).exp().transpose(1, 2).unsqueeze(-1), total
    return out, lse if return_lse else None, None, None, None


def _fa4_backward(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
    window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False,
    num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False,
    AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None,
    cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
    deterministic=False, dq=None, dk=None, dv=None, score_mod=None, score_mod_bwd=None,
    mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None, dlse=None,
    learnable_sink=None,
):  # fmt: skip
    """flash_attn_4 4.0.0b36: flash_attn.cute.interface._flash_attn_bwd."""
    _fa4_checks(q, k, v, learnable_sink)
    mask = _fa4_mask(softmax_scale, causal, softcap, window_size_left, window_size_right)
    assert learnable_sink is None  # its gradient would be a fourth
    _backward(dout, q, k, v, out, lse, dq, dk, dv, *mask)
    return dq, dk, dv


STAND_INS = {
    "fa4": SimpleNamespace(_flash_attn_fwd=_fa4_forward, _flash_attn_bwd=_fa4_backward),
    "fa2": SimpleNamespace(_flash_attn_forward=_fa2_forward, _flash_attn_backward=_fa2_backward),
    "fa3": SimpleNamespace(_flash_attn_forward=_fa3_forward, _flash_attn_backward=_fa3_backward),
}


@pytest.fixture(params=["fa2", "fa3", "fa4"])
def package(request, monkeypatch):
    monkeypatch.setattr(flash_attn, "_load", STAND_INS.__getitem__)
    monkeypatch.setattr(flash_attn, "_package", lambda *call: (request.param, None))
    return request.param


def _call(q_len, kv_len, dtype=torch.float64, dim=12, value_dim=5, sink=None, scale=0.3, **masks):
    if sink is None:
        sink = torch.randn(4, q_len).double()
    sink = sink.reshape(1, *sink.shape).requires_grad_()
    inputs = make_inputs(2, 4, 2, q_len, kv_len, dim, dtype, value_dim)
    return Call(*inputs, sink, Masks(**masks), 0.0, scale)


def _results(attend, call):
    leaves = (call.query, call.key, call.value, call.sink_logits)
    out = attend(call)
    return [out, *gradients(out, leaves, torch.ones_like(out).cumsum(-1))]


@pytest.mark.parametrize("mask", ["none", "window", "wide window", "alibi", "alibi and window"])
@pytest.mark.parametrize(("q_len", "kv_len"), [(19, 19), (7, 40), (1, 9), (1, 1)])
def test_outputs_and_every_gradient_equal_the_reference(package, mask, q_len, kv_len):
    masks = {"window": 5} if mask.endswith("window") else {}
    masks |= {"window": 100} if mask.startswith("wide") else {}
    if (
        mask.startswith("alibi") and package == "fa2"
    ):  # the others have none, and are not asked for it
        masks |= {"alibi_slopes": head_decay_rates(4)}
    call = _call(q_len, kv_len, **masks)
    for ours, expected in zip(
        _results(flash_attn.attend, call), _results(reference.attend, call), strict=True
    ):
        assert ours.shape == expected.shape
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_every_scale_is_the_definitions(package, scale):
    call = _call(7, 40, scale=scale, window=5)
    for ours, expected in zip(
        _results(flash_attn.attend, call), _results(reference.attend, call), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_tensors_that_begin_anywhere(package):
    """Of a wider projection, and beside something of an odd width in what follows."""
    made = torch.randn(2, 9, 2, 3 * 17, requires_grad=True, dtype=torch.float64)
    inputs = [part[..., 1:].transpose(1, 2) for part in made.split(17, dim=-1)]
    beside = torch.randn(2, 2, 9, 3, dtype=torch.float64)
    weights = torch.randn(2, 2, 9, 19, dtype=torch.float64)

    def differentiated(attend):
        out = attend(Call(*inputs, 0.3, Masks(), 0.0, 0.25))
        return out, *gradients(torch.cat([beside, out], -1), (made,), weights)

    for ours, exact in zip(
        differentiated(flash_attn.attend), differentiated(reference.attend), strict=True
    ):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_infinite_sinks(package):
    call = _call(9, 9, sink=torch.tensor([[-torch.inf], [torch.inf], [0.0], [1.0]]).double())
    out, *grads = _results(flash_attn.attend, call)
    plain = torch.nn.functional.scaled_dot_product_attention(
        *call[:3], is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(out[:, 0], plain[:, 0])
    assert (out[:, 1] == 0).all()
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[3][0, :2] == 0).all()
    assert (grads[3][0, 2:] != 0).all()


@pytest.mark.parametrize("per_head", [True, False])
def test_a_sink_for_each_head_is_one_of_fa4s_own(monkeypatch, per_head):
    given = []

    def forward(*tensors, learnable_sink=None, **keywords):
        given.append(learnable_sink)
        return _fa4_forward(*tensors, learnable_sink=learnable_sink, **keywords)

    package = SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=_fa4_backward)
    monkeypatch.setattr(flash_attn, "_load", lambda name: package)
    monkeypatch.setattr(flash_attn, "_package", lambda *call: ("fa4", None))
    call = _call(7, 12, window=5)
    sink = (torch.randn(1, 4, 1) if per_head else torch.zeros(1, 1, 1)).double().requires_grad_()
    call = call._replace(sink_logits=sink)
    for ours, expected in zip(
        _results(flash_attn.attend, call), _results(reference.attend, call), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(given[0], sink.expand(1, 4, 1).flatten())


@pytest.mark.parametrize(
    ("capability", "installed", "dim", "alibi", "deterministic", "expected"),
    [
        ((8, 0), "fa2 fa3 fa4", 256, False, True, "fa2"),
        ((12, 0), "fa2 fa4", 64, False, False, "fa2"),
        ((9, 0), "fa2 fa3 fa4", 64, False, False, "fa3"),
        ((9, 0), "fa2 fa3 fa4", 64, True, False, "fa2"),
        ((9, 0), "fa2 fa4", 200, False, False, "fa4"),
        ((9, 0), "fa3", 192, False, True, "fa3"),
        ((9, 0), "fa3 fa4", 193, False, True, "fa4"),
        ((9, 0), "fa3", 193, False, False, "fa3"),
        ((9, 0), "fa3", 193, False, True, "deterministic up to a head_dim of 192"),
        ((9, 0), "fa3", 64, True, False, "has no alibi_slopes"),
        ((10, 0), "fa2 fa4", 128, False, True, "fa4"),
        ((10, 3), "fa2 fa4", 136, False, False, "fa2"),
        ((10, 0), "fa4", 136, False, False, "head_dim up to 128"),
        ((10, 0), "", 64, False, False, "cannot be imported"),
        ((7, 5), "fa2", 64, False, False, "compute capability 8.0"),
    ],
)
def test_the_package_is_chosen_by_the_device_and_the_call(
    monkeypatch, capability, installed, dim, alibi, deterministic, expected
):
    def load(package):
        if package not in installed:
            raise ImportError("not installed")
        return STAND_INS[package]

    monkeypatch.setattr(flash_attn, "_load", load)
    monkeypatch.setattr(hardware, "kind_of", lambda tensor: "cuda")
    monkeypatch.setattr(hardware, "capability", lambda device: capability)
    query = torch.zeros(1, 2, 4, dim, dtype=torch.float16, requires_grad=True)
    masks = Masks(alibi_slopes=torch.ones(2) if alibi else None)
    flash_attn._choose_package.cache_clear()
    torch.use_deterministic_algorithms(deterministic)
    try:
        call = Call(query, query, query, torch.zeros(1, 1, 1), masks, 0.0, 1.0)
        reason = flash_attn.unsupported(call)
        assert flash_attn._package_for(call)[0] == expected or expected in reason
        with torch.no_grad():  # which no backward follows
            assert expected.startswith("fa") or (
                ("deterministic" in expected) == (flash_attn.unsupported(call) is None)
            )
    finally:
        torch.use_deterministic_algorithms(False)
        flash_attn._choose_package.cache_clear()


@pytest.mark.parametrize(
    ("capability", "installed", "ahead"),
    [
        ((9, 0), "fa3 fa2", True),
        ((9, 0), "fa4 fa2", False),
        ((10, 0), "fa4", True),
        ((10, 0), "fa2", False),
        ((12, 0), "fa4 fa2", False),
    ],
)
def test_auto_puts_it_first_where_its_kernel_is_ahead(monkeypatch, capability, installed, ahead):
    def load(package):
        if package not in installed:
            raise ImportError("not installed")
        return STAND_INS[package]

    monkeypatch.setattr(flash_attn, "_load", load)
    monkeypatch.setattr(hardware, "capability", lambda device: capability)
    assert flash_attn.is_ahead.__wrapped__() == ahead


def test_operators(package):
    call = _call(5, 9, torch.float32, dim=8, value_dim=8)
    query, key, value = (t.detach().transpose(1, 2) for t in call[:3])
    slopes = head_decay_rates(4) if package == "fa2" else None
    rest = (slopes, 3, 0.3, package)
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(
        flash_attn.flash_attn_forward, (*leaves, call.sink_logits, *rest), test_utils=checks
    )
    out, lse = flash_attn.flash_attn_forward(query, key, value, call.sink_logits.detach(), *rest)
    arguments = (torch.randn_like(out), query, key, value, out, lse, *rest)
    torch.library.opcheck(flash_attn.flash_attn_backward, arguments, test_utils=checks[:2])


def test_compiles_without_a_graph_break(package):
    call = _call(6, 9, torch.float32)
    torch._dynamo.reset()

    def attend(query, key, value, sink_logits):
        return flash_attn.attend(Call(query, key, value, sink_logits, Masks(window=4), 0.0, 0.3))

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    call = call._replace(masks=Masks(window=4))
    for ours, eager in zip(
        _results(lambda call: compiled(*call[:4]), call), _results(flash_attn.attend, call)
    ):
        torch.testing.assert_close(ours, eager)


def test_second_order_gradients_are_refused(package):
    call = _call(4, 4)
    (grad,) = torch.autograd.grad(flash_attn.attend(call).sum(), call.query, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        grad.sum().backward()


def test_no_rows(package):
    call = _call(0, 3)
    out, *grads = _results(flash_attn.attend, call)
    assert out.shape == (2, 4, 0, 5)
    assert all((grad == 0).all() for grad in grads)


def test_what_is_not_installed_is_named():
    with pytest.raises(ValueError, match="CUDA device"):
        sink_attention(*make_inputs(1, 2, 2, 4, 4, 8, torch.float32), 0.0, backend="flash_attn")
    problem = flash_attn.problem("fa2")
    assert problem is None or "cannot be imported" in problem


def test_a_version_with_other_signatures_is_refused(monkeypatch):
    def old(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap):
        """flash_attn 2.6."""

    monkeypatch.setattr(
        flash_attn, "_load", lambda package: SimpleNamespace(_flash_attn_forward=old)
    )
    assert "too old" in flash_attn.problem("fa2")
    monkeypatch.setattr(flash_attn, "_load", STAND_INS.__getitem__)
    assert all(flash_attn.problem(package) is None for package in flash_attn.MODULES)

    def without_sink(q, k, v, out, dout, lse, softmax_scale=None):
        """flash_attn_4 of early 2026."""

    for module in (SimpleNamespace(), SimpleNamespace(_flash_attn_bwd=without_sink)):
        monkeypatch.setattr(flash_attn, "_load", lambda package, module=module: module)
        assert "too old" in flash_attn.problem("fa4")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dropout_p": 0.5}, "dropout"),
        ({"masks": Masks(attn_mask=torch.ones(1, 1, 1, 4))}, "attn_mask"),
        ({"masks": Masks(documents=torch.ones(1, 4))}, "documents"),
        ({"masks": Masks(alibi_slopes=torch.ones(2, requires_grad=True))}, "alibi_slopes"),
        ({"query": {"dtype": torch.float32}}, "float16"),
        ({"query": {"dim": 257}}, "head_dim"),
    ],
)
def test_says_what_it_cannot_do(changes, reason, monkeypatch):
    call = _on_cuda(monkeypatch)
    assert flash_attn.unsupported(call) is None
    if "query" in changes:
        changes = {"query": _tensor_on_cuda(**changes["query"])}
    assert reason in flash_attn.unsupported(call._replace(**changes))


def test_transforms_are_for_others(monkeypatch):
    call, reasons = _on_cuda(monkeypatch), []
    with torch.autograd.forward_ad.dual_level():
        reasons.append(flash_attn.unsupported(call))
    torch.func.vmap(lambda x: reasons.append(flash_attn.unsupported(call)) or x)(torch.ones(2))
    assert [reason is not None and "torch.func" in reason for reason in reasons] == [True, True]


def _on_cuda(monkeypatch):
    monkeypatch.setattr(flash_attn, "_package", lambda *call: ("fa2", None))
    tensor = _tensor_on_cuda()
    return Call(tensor, tensor, tensor, None, Masks(), 0.0, 1.0)


def _tensor_on_cuda(dim=8, dtype=torch.bfloat16):
    return SimpleNamespace(
        device=torch.device("cuda"), is_cpu=False, dtype=dtype, shape=torch.Size([1, 2, 4, dim])
    )


class TestOnCUDA:
    pytestmark = marks.flash_attn_on_gpu

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("mask", ["none", "window", "alibi", "alibi and window"])
    @pytest.mark.parametrize(("q_len", "kv_len"), [(257, 257), (63, 300), (1, 300)])
    def test_outputs_and_every_gradient(self, dtype, mask, q_len, kv_len):
        inputs = [t.detach().cuda() for t in make_inputs(2, 4, 2, q_len, kv_len, 64, dtype)]
        sink = torch.tensor([[-torch.inf], [torch.inf], [0.0], [1.0]], device="cuda")
        keywords = {"window": 40} if mask.endswith("window") else {}
        if mask.startswith("alibi"):
            keywords["alibi_slopes"] = head_decay_rates(4).cuda()
        results = []
        for backend, precise in (("flash_attn", False), ("reference", False), ("reference", True)):
            leaves = [t.double() if precise else t for t in (*inputs, sink)]
            leaves = [t.clone().requires_grad_() for t in leaves]
            out = sink_attention(*leaves, backend=backend, **keywords)
            grad = torch.ones_like(out).cumsum(-1) / out.shape[-1]
            results.append((out, *gradients(out, leaves, grad)))
        for ours, dense, exact in zip(*results, strict=True):
            assert ours.isfinite().all()
            roundings = 4 * torch.finfo(dtype).eps * exact.abs().max()
            allowed = 2 * (dense.double() - exact).abs().max() + roundings
            assert (ours.double() - exact).abs().max() <= allowed


def test_what_fits_the_package_is_not_copied():
    cache = torch.randn(1, 2, 9, 64)
    assert flash_attn._to_package(cache, 64).data_ptr() == cache.data_ptr()
    assert flash_attn._to_package(cache, 72).shape == (1, 9, 2, 72)
