"""Which backend a call gets: by name, or by the order."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stablemask import pseudo_logsumexp, sink_attention
from stablemask.backends import BACKENDS, choice
from stablemask.backends.choice import choose
from stablemask.call import Call
from stablemask.masks import NO_MASKS, Masks
from tests.oracle import make_inputs


def _call(q_len=6, kv_len=6, dropout_p=0.0):
    query, key = (torch.zeros(()).expand(1, 2, length, 8) for length in (q_len, kv_len))
    return Call(query, key, key, torch.zeros(1, 1, 1), NO_MASKS, dropout_p, 1.0)


def _name(backend):
    return next(name for name, candidate in BACKENDS.items() if candidate is backend)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_name_is_taken_or_refused_with_the_reason(name):
    call = _call(dropout_p=0.5)
    reason = BACKENDS[name].unsupported(call)
    if reason is None:
        assert choose(call, name) is BACKENDS[name]
    else:
        with pytest.raises(ValueError, match=f"backend '{name}' cannot serve this call: ") as error:
            choose(call, name)
        assert reason in str(error.value)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .* got 'fastest'"):
        choose(_call(), "fastest")


@pytest.mark.parametrize(
    ("device", "one_row", "cudnn", "ahead", "expected"),
    [
        ("cpu", False, True, True, "native flash blocks"),
        ("mps", True, True, True, "flash blocks"),
        ("cuda", False, False, False, "flash blocks"),
        ("cuda", False, True, False, "cudnn flash blocks"),
        ("cuda", True, True, False, "flash blocks"),
        ("cuda", False, True, True, "flash_attn cudnn flash blocks"),
        ("cuda", True, True, True, "flash_attn flash blocks"),
    ],
)
def test_the_order(device, one_row, cudnn, ahead, expected, monkeypatch):
    monkeypatch.setattr(choice, "_stock_prefers_cudnn", lambda: cudnn)
    monkeypatch.setattr(choice.flash_attn, "is_ahead", lambda: ahead)
    assert choice.order(device, one_row) == tuple(expected.split())


def test_any_long_input_is_served_in_blocks():
    long = torch.zeros(1, 1, 4097, 8)
    query = long[:, :, :1]
    assert sink_attention(query, long, long, 0.0, dropout_p=0.5).shape == (1, 1, 1, 8)
    assert _name(choose(_call(1, 4097, dropout_p=0.5), "auto")) == "blocks"


def test_one_compilation_serves_every_length():
    torch._dynamo.reset()
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=count)
    def attend(query, key, value):
        return sink_attention(query, key, value, 0.0)

    for length in (9, 500, 5000):
        inputs = make_inputs(1, 2, 2, length, length, 8, torch.float32)
        out = attend(*inputs)
        torch.testing.assert_close(out, sink_attention(*inputs, 0.0))
    assert len(compilations) == 1


def test_the_choice_does_not_import_the_compiler():
    code = "import sys, stablemask.backends.choice; print('torch._dynamo' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"


class _NoFloat64(TorchDispatchMode):
    """Refuses what a kind of device does not have, as its kernels do."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "mps":
                assert tensor.dtype != torch.float64, function
        return result


def test_apples_gpu_is_served_by_stock_operations():
    """On tensors that have its type and no values, all that there is without one."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        query, key = (torch.empty(1, h, 64, 8, device="mps", dtype=torch.float16) for h in (4, 2))
        for masks in (NO_MASKS, Masks(window=5), Masks(alibi_slopes=torch.ones(4, device="mps"))):
            call = Call(query, key, key, query.new_zeros(1, 4, 1), masks, 0.0, 0.1)
            assert _name(choose(call, "auto")) == "blocks"
            with pytest.raises(ValueError, match="no stock flash kernel for device type 'mps'"):
                choose(call, "flash")
        with _NoFloat64():
            for gamma in (0.1, torch.full((4,), 0.1, device="mps")):
                for horizon in (None, 70):
                    sink = pseudo_logsumexp(torch.arange(64, device="mps"), gamma, horizon)
                    assert (sink.device.type, sink.dtype) == ("mps", torch.float32)
