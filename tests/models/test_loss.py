"""The chunked loss against Transformers' own, and that it never holds all logits."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.loss.loss_utils import ForCausalLMLoss

from stablemask.backends.calls import say_once
from stablemask.models import loss as loss_module
from stablemask.models.loss import chunked_causal_lm_loss
from tests import cuda_contract

from .tiny import random_ids, tiny_model

VOCABULARY, TOKENS = 61, 4 * 16


@pytest.fixture(autouse=True)
def _chunks_of_ten_tokens(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 10 * VOCABULARY)


def loss_and_gradients(loss, hidden_states, weight, autocast, dtype=torch.float32):
    hidden_states = hidden_states.to(dtype, copy=True).requires_grad_()
    weight = weight.to(dtype, copy=True).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        value = loss(hidden_states, weight)
    value.backward()
    assert value.dtype == torch.float32
    return value.detach(), hidden_states.grad, weight.grad


def distance(ours, exact):
    """Of the loss and of both gradients, in the norm."""
    return [
        ((a.double() - b).norm() / b.norm().clamp(min=1e-12)).item() for a, b in zip(ours, exact)
    ]


CASES = {
    "labels": {},
    "num_items": {"num_items_in_batch": torch.tensor(77)},
    "num_items_int": {"num_items_in_batch": 77},
    "shifted": {"shift": True},
}


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_transformers_loss_and_gradients(case, precision):
    settings = dict(CASES[case])
    hidden_states, weight = torch.randn(4, 16, 32), torch.randn(VOCABULARY, 32)
    labels = random_ids(4, 16)
    labels[0, :7] = labels[2, 3] = labels[3] = -100
    if settings.pop("shift", False):
        settings["shift_labels"], labels = labels, None

    def theirs(hidden_states, weight):
        logits = F.linear(hidden_states, weight)
        return ForCausalLMLoss(logits, labels, VOCABULARY, **settings)

    def ours(hidden_states, weight):
        return chunked_causal_lm_loss(hidden_states, weight, labels, **settings)

    shift_labels = settings.get("shift_labels")
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=-100)[:, 1:]
    exact_inputs = [t.double().requires_grad_() for t in (hidden_states, weight)]
    total = F.cross_entropy(
        F.linear(*exact_inputs).flatten(0, 1), shift_labels.flatten(), reduction="sum"
    )
    count = settings.get("num_items_in_batch", (shift_labels != -100).sum())
    exact_loss = total / count
    exact_loss.backward()
    exact = (exact_loss.detach(), *(t.grad for t in exact_inputs))

    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    arguments = (hidden_states, weight, precision == "autocast", dtype)
    reference = distance(loss_and_gradients(theirs, *arguments), exact)
    for error, allowed in zip(
        distance(loss_and_gradients(ours, *arguments), exact), reference, strict=True
    ):
        assert error <= 2 * allowed + 1e-7


@pytest.mark.parametrize("settings", [{}, {"tie_word_embeddings": True}])
def test_a_model_trains_alike(settings):
    """Two batches into one step, as the Trainer normalises them."""
    models = [tiny_model(**settings).train()]
    models.append(copy.deepcopy(models[0]))
    models[1].chunked_loss = True
    batches = [random_ids(2, 16), random_ids(3, 9)]
    batches[1][0, 4:] = 0
    labels = [ids.masked_fill(ids == 0, -100) for ids in batches]
    count = sum((each[:, 1:] != -100).sum() for each in labels)
    losses = []
    for model in models:
        for ids, each in zip(batches, labels):
            output = model(ids, labels=each, num_items_in_batch=count)
            output.loss.backward()
            losses.append(output.loss.detach())
        assert (output.logits is None) == model.chunked_loss
    torch.testing.assert_close(losses[2:], losses[:2])
    for ours, theirs in zip(models[1].parameters(), models[0].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_labels_may_come_shifted_without_the_chunks():
    model, ids = tiny_model(), random_ids(2, 9)
    shifted = F.pad(ids, (0, 1), value=-100)[:, 1:].contiguous()
    expected = model(ids, labels=ids).loss
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, expected)
    model.chunked_loss = True
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, expected)
    assert model(ids).logits.shape == (2, 9, VOCABULARY)  # no labels, no change


@pytest.mark.parametrize("change", [{"logits_to_keep": 3}, {"shift_labels": random_ids(2, 8)}])
def test_labels_that_do_not_fit_the_rows_are_refused(change):
    """As without the chunks, where Transformers says so."""
    model, ids = tiny_model(), random_ids(2, 9)
    for model.chunked_loss in (True, False):
        with pytest.raises(ValueError, match=r"labels do not fit|to match target batch_size"):
            model(ids, labels=ids, **change)


def test_rows_without_a_label_count_for_nothing():
    hidden_states = torch.randn(2, 8, 32, requires_grad=True)
    weight = torch.randn(VOCABULARY, 32, requires_grad=True)
    labels = torch.full((2, 8), -100)
    loss = chunked_causal_lm_loss(hidden_states, weight, labels, num_items_in_batch=5)
    loss.backward()
    assert loss == 0
    assert not hidden_states.grad.any()
    assert not weight.grad.any()
    theirs = ForCausalLMLoss(F.linear(hidden_states, weight), labels, VOCABULARY)
    assert theirs.isnan()
    assert chunked_causal_lm_loss(hidden_states, weight, labels).isnan()


def test_large_logits_neither_overflow_nor_vanish():
    hidden_states = torch.full((1, 3, 32), 30.0)
    weight = torch.linspace(-20, 20, VOCABULARY)[:, None].expand(-1, 32).contiguous()
    labels = torch.tensor([[1, 0, VOCABULARY - 1]])
    expected = ForCausalLMLoss(F.linear(hidden_states, weight), labels, VOCABULARY)
    torch.testing.assert_close(chunked_causal_lm_loss(hidden_states, weight, labels), expected)


class LargestTensor(TorchDispatchMode):
    """Most elements of any tensor of logits."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        is_tensor = isinstance(result, torch.Tensor)
        # The weight, transposed, ends in the vocabulary too.
        if is_tensor and result.shape[-1:] == (VOCABULARY,) and result.shape[:-1] != (32,):
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("chunked", [False, True])
def test_no_more_than_a_chunk_of_logits_is_ever_held(chunked):
    model = tiny_model().train()
    model.chunked_loss = chunked
    ids = random_ids(4, 16)
    with LargestTensor() as largest:
        model(ids, labels=ids).loss.backward()
    assert largest.numel == (10 if chunked else TOKENS) * VOCABULARY


@pytest.mark.parametrize("frozen", ["hidden_states", "weight", "both", "no_grad"])
def test_gradients_that_nobody_wants_are_not_worked_out(frozen):
    # In bfloat16, where each is a product that PyTorch counts.
    hidden_states, weight = (
        torch.randn(4, 16, 32).bfloat16(),
        torch.randn(VOCABULARY, 32).bfloat16(),
    )
    hidden_states.requires_grad_(frozen in ("weight", "no_grad"))
    weight.requires_grad_(frozen in ("hidden_states", "no_grad"))
    labels = random_ids(4, 16)
    product = 2 * TOKENS * VOCABULARY * 32
    with (
        torch.set_grad_enabled(frozen != "no_grad"),
        FlopCounterMode(display=False) as counter,
    ):
        loss = chunked_causal_lm_loss(hidden_states, weight, labels)
    products = 1 if frozen in ("both", "no_grad") else 2
    assert counter.get_total_flops() == products * product
    if products == 2:
        loss.backward()
    assert (hidden_states.grad is None) == (frozen != "weight")
    assert (weight.grad is None) == (frozen != "hidden_states")


@pytest.mark.parametrize("precision", ["float32", "autocast", "bfloat16"])
def test_on_cuda_a_chunk_is_compiled_once(monkeypatch, precision):
    """Through the compiler's first half, for the emulated device has no kernels: the same to the bit."""
    hidden_states, weight = torch.randn(4, 16, 32), torch.randn(VOCABULARY, 32)
    labels = random_ids(4, 16)
    labels[0, :7] = -100
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    arguments = (hidden_states, weight, precision == "autocast", dtype)

    def loss(hidden_states, weight):
        return chunked_causal_lm_loss(hidden_states, weight, labels)

    monkeypatch.setattr(loss_module, "CACHED_LOGITS", 0)  # the CPU's chunks are CUDA's
    expected = loss_and_gradients(loss, *arguments)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    aot_eager = torch._dynamo.lookup_backend("aot_eager")
    torch.compiler.reset()
    cuda_contract.emulate(monkeypatch, (9, 0))
    monkeypatch.setattr(loss_module.hardware, "compiler_problem", lambda: None)
    compiled = torch.compile(loss_module._of_chunk, backend=backend, fullgraph=True)
    monkeypatch.setattr(loss_module, "compiled_chunk", lambda: compiled)
    for _ in range(2):
        for ours, eager in zip(loss_and_gradients(loss, *arguments), expected, strict=True):
            torch.testing.assert_close(ours, eager, rtol=0, atol=0)
    assert 1 <= len(graphs) <= 2  # full chunks, and any number of rows


def test_without_a_compiler_cuda_says_so_and_computes_the_same(monkeypatch):
    hidden_states, weight, labels = (
        torch.randn(2, 8, 32),
        torch.randn(VOCABULARY, 32),
        random_ids(2, 8),
    )
    expected = chunked_causal_lm_loss(hidden_states, weight, labels)
    cuda_contract.emulate(monkeypatch, (9, 0))
    say_once.cache_clear()
    with pytest.warns(UserWarning, match="not compiled, and slower for it: nothing is compiled"):
        torch.testing.assert_close(
            chunked_causal_lm_loss(hidden_states, weight, labels), expected, rtol=0, atol=0
        )


def test_a_second_backward_is_refused():
    hidden_states = torch.randn(1, 8, 32, requires_grad=True)
    loss = chunked_causal_lm_loss(hidden_states, torch.randn(VOCABULARY, 32), random_ids(1, 8))
    (3 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("tied", [False, True])
def test_it_finds_the_weight_gathered_under_fsdp2(tied, tmp_path):
    """``lm_head`` stands in the group of the root, which is gathered during the root's forward."""
    model = tiny_model(tie_word_embeddings=tied).train()
    whole = copy.deepcopy(model)
    ids = random_ids(4, 16)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.chunked_loss = True
        for each in (model, whole):
            for batch in ids.split(2):
                (each(batch, labels=batch).loss / 2).backward()
        assert isinstance(model.lm_head.weight, DTensor)
        for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad)
    finally:
        dist.destroy_process_group()
