"""FlexAttention with a sink: on the CPU forward only, where the sink is one more key.

Compiling takes most of the time, so the cases share a few compiled kernels: causal, one with every
mask, a row after a cache, and half precision.
"""

import warnings

import pytest
import torch

from stablemask import head_decay_rates, sink_attention
from stablemask.backends import calls, flex, hardware, reference
from stablemask.call import Call
from stablemask.masks import Masks
from tests import cuda_contract, marks
from tests.oracle import assert_no_further_than_twice, gradients, make_inputs, sink_definition

KV_LEN = 310


def _assert_close_to_definition(inputs, sink, definition, **keywords):
    """No further from float64 than twice the dense backend is in the same precision."""
    with torch.no_grad():
        out = sink_attention(*inputs, sink, backend="flex", **keywords)
        dense = sink_attention(*inputs, sink, backend="reference", **keywords)
    assert out.dtype == inputs[0].dtype
    assert_no_further_than_twice((out,), (dense,), (definition,), inputs[2].abs().max())


def _definition(inputs, sink, **keywords):
    with torch.no_grad():
        return sink_definition(*(t.double() for t in inputs), sink.double(), **keywords)


@marks.cpp_compiler
class TestOnCPU:
    @pytest.mark.parametrize(
        ("q_len", "window"), [(310, None), (257, None), (257, 1), (300, 40), (300, 129)]
    )
    def test_causal_and_window_behind_a_cache(self, q_len, window):
        inputs = make_inputs(2, 4, 2, q_len, KV_LEN, 8, torch.float32, value_dim=24)
        sink = torch.randn(4, 1)
        distance = torch.arange(KV_LEN - q_len, KV_LEN).unsqueeze(-1) - torch.arange(KV_LEN)
        visible = None if window is None else distance < window
        definition = _definition(inputs, sink, visible=visible)
        _assert_close_to_definition(inputs, sink, definition, window=window)

    @pytest.mark.parametrize("alone", ["alibi", "documents", "bool", "all"])
    def test_masks(self, alone):
        """One kernel takes them all; those that are not tested are made to change nothing."""
        q_len = 300
        inputs = make_inputs(2, 4, 2, q_len, KV_LEN, 8, torch.float32, value_dim=24)
        sink = torch.randn(2, 4, q_len)
        slopes = torch.zeros(4) if alone in ("documents", "bool") else head_decay_rates(4)
        documents = torch.zeros(2, KV_LEN, dtype=torch.int64)
        if alone in ("documents", "all"):
            documents = torch.stack([torch.arange(KV_LEN) // 70, torch.arange(KV_LEN) // 33 % 3])
        allowed = torch.ones(2, 1, q_len, KV_LEN, dtype=torch.bool)
        if alone in ("bool", "all"):
            allowed = torch.rand(2, 1, q_len, KV_LEN) > 0.4
            allowed[:, :, 5:9] = False  # rows that see nothing
        distance = torch.arange(KV_LEN - q_len, KV_LEN).unsqueeze(-1) - torch.arange(KV_LEN)
        same = documents[:, None, KV_LEN - q_len :, None] == documents[:, None, None, :]
        definition = _definition(
            inputs, sink, visible=allowed & same, bias=-slopes.double().view(-1, 1, 1) * distance
        )
        _assert_close_to_definition(
            inputs, sink, definition, attn_mask=allowed, documents=documents, alibi_slopes=slopes
        )

    def test_documents_alone(self):
        inputs = make_inputs(2, 4, 2, 300, KV_LEN, 8, torch.float32)
        documents = torch.arange(KV_LEN) // 70
        same = documents[KV_LEN - 300 :, None] == documents
        definition = _definition(inputs, torch.zeros(4, 1), visible=same)
        _assert_close_to_definition(
            inputs, torch.zeros(4, 1), definition, documents=documents.expand(2, -1)
        )

    def test_a_mask_of_one_key(self):
        inputs = make_inputs(1, 1, 1, 1, 1, 8, torch.float32)
        sink, mask = torch.zeros(1, 1), torch.ones(1, dtype=torch.bool)
        _assert_close_to_definition(inputs, sink, _definition(inputs, sink), attn_mask=mask)

    def test_square_masks_in_float64(self):
        inputs = make_inputs(2, 4, 1, 257, 257, 8, torch.float32)
        sink, slopes = torch.randn(4, 1), torch.rand(4).double()
        bias = torch.randn(2, 4, 257, 257).double()
        bias[..., 30:50] = -torch.inf
        distance = torch.arange(257).unsqueeze(-1) - torch.arange(257)
        definition = _definition(inputs, sink, bias=bias - slopes.view(-1, 1, 1) * distance)
        _assert_close_to_definition(inputs, sink, definition, attn_mask=bias, alibi_slopes=slopes)

    def test_infinite_sinks(self):
        query, key, value = make_inputs(2, 4, 2, 300, KV_LEN, 8, torch.float32, value_dim=24)
        sink = torch.tensor([[-torch.inf], [torch.inf], [0.0], [1.0]])
        with torch.no_grad():
            out = sink_attention(query, key, value, sink, backend="flex")
            plain = sink_attention(query, key, value, -torch.inf, backend="reference")
        assert (out[:, 1] == 0).all()
        torch.testing.assert_close(out[:, 0], plain[:, 0])
        assert out.isfinite().all()

    @pytest.mark.parametrize("sink", [-torch.inf, torch.finfo(torch.float32).min, -1e30])
    def test_a_row_that_sees_nothing_not_even_a_sink_is_zero(self, sink):
        inputs = make_inputs(2, 4, 2, 300, KV_LEN, 8, torch.float32, value_dim=24)
        allowed = torch.ones(2, 1, 300, KV_LEN, dtype=torch.bool)
        allowed[:, :, 7] = False
        with torch.no_grad():
            out = sink_attention(
                *inputs,
                torch.full((4, 1), sink),
                attn_mask=allowed,
                documents=torch.zeros(2, KV_LEN, dtype=torch.int64),
                alibi_slopes=torch.zeros(4),
                backend="flex",
            )
        assert (out[:, :, 7] == 0).all()
        assert out.isfinite().all()

    @pytest.mark.parametrize("kv_len", [2, 40, 101])
    def test_a_row_after_a_cache(self, kv_len):
        inputs = make_inputs(2, 4, 1, 1, kv_len, 8, torch.float32)
        sink = torch.randn(4, 1)
        _assert_close_to_definition(inputs, sink, _definition(inputs, sink))

    def test_additive_mask_in_bfloat16(self):
        inputs = make_inputs(2, 4, 4, 300, KV_LEN, 16, torch.bfloat16)
        sink, bias = torch.randn(4, 1), torch.randn(1, 4, 1, KV_LEN)
        bias[..., :20] = -torch.inf
        definition = _definition(inputs, sink, bias=bias.double())
        _assert_close_to_definition(inputs, sink, definition, attn_mask=bias)

        # The lowest number of all is added too: those rows see their keys, all alike.
        bias.fill_(torch.finfo(torch.float32).min)
        for sink, share in ((-torch.inf, 1.0), (-1e32, 0.0)):
            with torch.no_grad():
                out = sink_attention(*inputs, sink, attn_mask=bias, backend="flex")
            mean = inputs[2].double().cumsum(2) / torch.arange(1, KV_LEN + 1).view(-1, 1)
            expected = share * mean[:, :, -300:]
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=0.02)

    def test_lengths_of_one_structure_share_a_kernel(self):
        made = [
            flex._compiled(flex._structure(_call(q_len, 2 * q_len))) for q_len in (200, 257, 999)
        ]
        assert made[0] is made[1] is made[2]
        assert made[0] is not flex._compiled(flex._structure(_call(200, 400, window=3, heads=3)))

    def test_inside_another_compilation_it_is_refused(self):
        torch._dynamo.reset()

        @torch.compile(fullgraph=True, backend="eager")
        def attend(query):
            return 0 if flex.unsupported(_call()._replace(query=query)) is None else 1

        with torch.no_grad():
            assert attend(torch.zeros(1, 2, 5, 8)) == 1


@pytest.fixture
def unfused(monkeypatch):
    """The way of CUDA, on this CPU: PyTorch's unfused FlexAttention has the lse and a backward."""
    monkeypatch.setattr(flex, "_returns_lse", lambda device: True)
    monkeypatch.setattr(flex, "_compiled", lambda structure: flex._flex)
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)


def _every_gradient(attend, call):
    leaves = [*call[:4], call.masks.attn_mask, call.masks.alibi_slopes]
    leaves = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    out = attend(call)
    return [out, *gradients(out, leaves, torch.ones_like(out).cumsum(-1) / out.shape[-1])]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("mask", ["none", "window", "alibi", "documents", "bool", "bias", "all"])
@pytest.mark.parametrize(("q_len", "kv_len"), [(150, 150), (130, 300)])
def test_with_lse_outputs_and_every_gradient_equal_the_reference(unfused, mask, q_len, kv_len):
    masks = {
        "none": {},
        "window": {"window": 40},
        "alibi": {"alibi_slopes": head_decay_rates(4).double().requires_grad_()},
        "documents": {"documents": torch.stack([torch.arange(kv_len) // 70] * 2)},
        "bool": {"attn_mask": torch.rand(2, 1, q_len, kv_len) > 0.4},
        "bias": {"attn_mask": torch.randn(1, 4, 1, kv_len).double().requires_grad_()},
    }
    masks["bool"]["attn_mask"][:, :, 5:9] = False  # rows that see nothing
    if mask == "all":
        masks["all"] = masks["bias"] | masks["alibi"] | masks["window"] | masks["documents"]
    sink = torch.tensor([[[-torch.inf], [torch.inf], [0.0], [1.0]]]).double().requires_grad_()
    inputs = make_inputs(2, 4, 2, q_len, kv_len, 16, torch.float64, value_dim=24)
    call = Call(*inputs, sink, Masks(**masks[mask]), 0.0, 0.3)
    ours, expected = _every_gradient(flex.attend, call), _every_gradient(reference.attend, call)
    for actual, exact in zip(ours, expected, strict=True):
        # The sink logits are float32 here.
        torch.testing.assert_close(actual, exact, rtol=1e-6, atol=1e-6)


def test_with_lse_traces_inside_another_compilation(unfused):
    query, key, value = make_inputs(1, 2, 1, 150, 170, 16, torch.float32)
    documents = torch.arange(170)[None] // 50
    torch._dynamo.reset()

    def attend(query, key, value):
        masks = Masks(window=60, documents=documents)
        return flex.attend(Call(query, key, value, torch.zeros(1, 1, 1), masks, 0.0, 0.25)) * 2

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    masks = Masks(window=60, documents=documents)
    call = Call(query, key, value, torch.zeros(1, 1, 1), masks, 0.0, 0.25)
    torch.testing.assert_close(compiled(query, key, value), reference.attend(call) * 2)


def _call(q_len=5, kv_len=5, heads=2, dtype=torch.float32, device="cpu", dropout_p=0.0, **masks):
    query, key = (torch.zeros(1, heads, n, 8, dtype=dtype, device=device) for n in (q_len, kv_len))
    return Call(query, key, key, torch.zeros(1, 1, 1), Masks(**masks), dropout_p, 1.0)


@pytest.mark.parametrize(
    ("keywords", "reason"),
    [
        ({"device": "meta"}, "not on 'meta'"),
        ({"dtype": torch.float64}, "float64"),
        ({"dropout_p": 0.5}, "dropout"),
        ({"alibi_slopes": torch.ones(2, requires_grad=True)}, "no backward on the CPU"),
    ],
)
def test_says_what_it_cannot_do(keywords, reason):
    assert reason in flex.unsupported(_call(**keywords))


def test_a_gradient_is_refused_on_the_cpu_only_where_it_is_asked_for():
    inputs = make_inputs(1, 2, 2, 5, 5, 8, torch.float32)
    with pytest.raises(ValueError, match="no backward on the CPU"):
        sink_attention(*inputs, 0.0, backend="flex")
    with torch.no_grad():
        problem = flex.unsupported(_call()._replace(query=inputs[0]))
    assert problem is None or "backward" not in problem


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    flex._look_for_compiler.cache_clear()
    try:
        assert "no-such-compiler" in flex.unsupported(_call())
    finally:
        flex._look_for_compiler.cache_clear()


def _blocks_by_pooling(visible):
    """Which blocks hold some, and only, visible scores, from the whole mask."""
    n, m = visible.shape[-2:]
    size = flex._BLOCK
    padded = torch.nn.functional.pad(visible.float(), (0, -m % size, 0, -n % size))
    blocks = padded.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
    return blocks.amax((-3, -1)).bool(), blocks.amin((-3, -1)).bool()


def _as_set(num_blocks, indices):
    dense = torch.zeros(indices.shape, dtype=torch.bool)
    for at in torch.cartesian_prod(*(torch.arange(size) for size in num_blocks.shape)).tolist():
        dense[(*at, indices[(*at, slice(0, int(num_blocks[tuple(at)])))].long())] = True
    return dense


@pytest.mark.parametrize(("q_len", "kv_len"), [(700, 700), (300, 701), (1, 400), (129, 129)])
@pytest.mark.parametrize("window", [None, 1, 200, 300])
@pytest.mark.parametrize("with_documents", [False, True])
def test_block_mask_from_bounds(q_len, kv_len, window, with_documents):
    """No block that holds a visible score is skipped, and none is called full that is not."""
    documents = torch.arange(kv_len)[None] // 150 if with_documents else None
    tensors = flex._make_blocks(q_len, kv_len, window, False, False, torch.device("cpu"), documents)
    partial, full = _as_set(*tensors[:2]), _as_set(*tensors[2:4])
    distance = torch.arange(kv_len - q_len, kv_len).unsqueeze(-1) - torch.arange(kv_len)
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if with_documents:
        visible = visible & (documents[0, kv_len - q_len :, None] == documents[0])
    some, every = _blocks_by_pooling(visible)
    assert not (partial & full).any()
    assert torch.equal((partial | full)[0, 0], some)
    assert (every | ~full[0, 0]).all()
    if not with_documents:  # documents may begin inside a block that they fill
        assert torch.equal(full[0, 0], every)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=marks.gpu), "sm90"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", ["none", "window", "alibi", "documents", "bool", "float"])
@pytest.mark.parametrize(("q_len", "kv_len"), [(257, 257), (130, 300)])
def test_on_cuda_outputs_and_every_gradient(monkeypatch, device, dtype, mask, q_len, kv_len):
    if device.type == "cpu":
        monkeypatch.setattr(hardware, "compiler_problem", lambda: None)
    keywords = {
        "none": {},
        "window": {"window": 40},
        "alibi": {"alibi_slopes": head_decay_rates(4).to(device).requires_grad_()},
        "documents": {"documents": torch.arange(kv_len, device=device) // 70},
        "bool": {"attn_mask": torch.rand(2, 1, q_len, kv_len, device=device) > 0.4},
        "float": {"attn_mask": torch.randn(1, 4, q_len, kv_len, device=device).requires_grad_()},
    }[mask]
    inputs = make_inputs(2, 4, 2, q_len, kv_len, 32, dtype)
    sink = torch.tensor([[-torch.inf], [torch.inf], [0.0], [1.0]])
    inputs = tuple(t.detach().to(device).requires_grad_() for t in (*inputs, sink))
    learned = [t for t in keywords.values() if isinstance(t, torch.Tensor) and t.requires_grad]
    results = []
    for precise, backend in ((False, "flex"), (False, "reference"), (True, "reference")):
        leaves = tuple(t.detach().double().requires_grad_() for t in inputs) if precise else inputs
        out = sink_attention(*leaves, backend=backend, **keywords)
        grad = torch.ones_like(out).cumsum(-1) / out.shape[-1]
        results.append([out, *gradients(out, (*leaves, *learned), grad)])
    # The longest sum is that of a row of `grad * out`, in the gradient of the sink.
    term = (grad * out).abs().sum(-1).max()
    results = [[t.detach().cpu() for t in each] for each in results]
    assert_no_further_than_twice(
        *(each[: len(results[0]) - len(learned)] for each in results), term
    )
    for each, leaf in zip(
        zip(*(r[len(r) - len(learned) :] for r in results)), learned, strict=True
    ):
        # Each term has an error of the inputs' dtype; the terms are added one at a time, in any order, in
        # float32: one rounding of the sum each, of either sign.
        largest, count = each[2].abs().max(), 2 * 4 * q_len * kv_len / leaf.numel()
        coarser = torch.finfo(dtype).eps / torch.finfo(leaf.dtype).eps
        summed = max(coarser * max(term, largest), count**0.5 / 4 * largest)
        assert_no_further_than_twice(*([t] for t in each), summed)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "reason"),
    [
        (torch.float32, 64, (8, 6), None),
        (torch.float32, 128, (8, 6), "147456 bytes of shared memory, this device has 101376"),
        (torch.bfloat16, 128, (8, 6), None),
        (torch.float32, 128, (8, 0), None),
        (torch.float32, 96, (8, 0), "shared memory"),  # for which PyTorch chooses larger blocks
        (torch.float32, 96, (9, 0), None),
    ],
)
def test_float32_is_refused_where_its_blocks_do_not_fit(
    monkeypatch, dtype, head_dim, capability, reason
):
    monkeypatch.setitem(cuda_contract.SHARED_MEMORY, (8, 6), 101376)
    cuda_contract.emulate(monkeypatch, capability)
    monkeypatch.setattr(hardware, "compiler_problem", lambda: None)
    query = torch.zeros(1, 2, 5, head_dim, dtype=dtype)
    problem = flex.unsupported(_call()._replace(query=query, key=query, value=query))
    assert problem is None if reason is None else reason in problem


@pytest.mark.parametrize(
    ("package", "compiler", "reason"),
    [
        (None, "gcc", "Triton is not installed"),
        ("triton", "no-such-compiler", "there is no 'no-such-compiler'"),
        ("triton", "python", None),
    ],
)
def test_on_cuda_it_needs_triton_and_a_compiler(monkeypatch, package, compiler, reason):
    asked = hardware._look_for_compiler.__wrapped__
    cuda_contract.emulate(monkeypatch, (9, 0))
    monkeypatch.setattr(hardware, "compiler_problem", asked)
    monkeypatch.setattr(hardware, "find_spec", lambda name: package)
    monkeypatch.setattr(hardware.shutil, "which", lambda name: name == "python" or None)
    monkeypatch.setenv("CC", compiler)
    problem = flex.unsupported(_call())
    assert problem is None if reason is None else reason in problem


def test_exporting_with_a_dynamic_length_is_refused(monkeypatch):
    cuda_contract.emulate(monkeypatch, (9, 0))
    monkeypatch.setattr(hardware, "compiler_problem", lambda: None)

    class Attention(torch.nn.Module):
        def forward(self, query):
            return sink_attention(query, query, query, 0.5, window=5, backend="flex")

    query, length = torch.zeros(1, 2, 240, 16), torch.export.Dim("length", min=2, max=512)
    with pytest.raises(ValueError, match="exported with a dynamic length"):
        torch.export.export(Attention(), (query,), dynamic_shapes=({2: length},))


def test_the_first_compilation_is_told_once():
    calls.say_once.cache_clear()
    structures = [flex._structure(_call(heads=heads)) for heads in (7, 9)]
    with pytest.warns(UserWarning, match="FlexAttention compiles a kernel"):
        flex._compiled(structures[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flex._compiled(structures[1])
