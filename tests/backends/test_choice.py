"""Which backend a call gets: by name, by what was measured, by the default order."""

import json
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stablemask import pseudo_logsumexp, sink_attention
from stablemask.backends import BACKENDS, choice
from stablemask.backends.choice import KINDS, PASSES, choose
from stablemask.call import Call
from stablemask.masks import NO_MASKS, Masks
from tests.oracle import make_inputs


def _call(q_len=6, kv_len=6, dtype=torch.float32, dropout_p=0.0, masks=NO_MASKS, training=False):
    number = torch.zeros((), dtype=dtype, requires_grad=training)
    query, key = (number.expand(1, 2, length, 8) for length in (q_len, kv_len))
    return Call(query, key, key, torch.zeros(1, 1, 1), masks, dropout_p, 1.0)


def _name(backend):
    return next(name for name, candidate in BACKENDS.items() if candidate is backend)


@pytest.fixture
def measured(monkeypatch):
    """Measurements that take the place of the repository's."""
    rows = []
    monkeypatch.setattr(choice, "_measurements", lambda device: rows if device == "cpu" else [])
    choice.rank.cache_clear()
    yield lambda length, times, kind="causal", step="training", q_len=None: rows.append(
        {
            "device": "cpu", "dtype": "float32", "kind": kind, "pass": step,
            "q_len": q_len or length, "kv_len": length, "milliseconds": times,
        }
    )  # fmt: skip
    choice.rank.cache_clear()


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


def test_the_fastest_at_the_nearest_length_is_taken(measured):
    measured(128, {"flash": 3.0, "blocks": 2.0})
    measured(4000, {"flash": 1.0, "blocks": 2.0})
    chosen = [_name(choose(_call(n, n, training=True), "auto")) for n in (2, 128, 500, 1000, 9000)]
    assert chosen == ["blocks", "blocks", "blocks", "flash", "flash"]


def test_rows_count_as_well_as_keys(measured):
    measured(4096, {"flash": 2.0, "blocks": 1.0}, step="inference", q_len=16)
    measured(4096, {"flash": 1.0, "blocks": 2.0}, step="inference", q_len=4096)
    assert _name(choose(_call(32, 4096), "auto")) == "blocks"
    assert _name(choose(_call(2048, 4096), "auto")) == "flash"


def test_the_next_fastest_serves_what_the_fastest_cannot(measured):
    measured(128, {"cudnn": 1.0, "flash": 2.0, "blocks": 3.0})
    assert _name(choose(_call(128, 128, training=True), "auto")) == "flash"
    dropout = _call(128, 128, dropout_p=0.5, training=True)
    assert _name(choose(dropout, "auto")) == "blocks"


def test_noise_does_not_displace_the_default(measured):
    measured(128, {"flash": 1.1, "blocks": 1.0})
    measured(4096, {"flash": 1.3, "blocks": 1.0})
    assert _name(choose(_call(128, 128, training=True), "auto")) == "flash"
    assert _name(choose(_call(4096, 4096, training=True), "auto")) == "blocks"


@pytest.mark.parametrize("name", ["reference", "flex"])
def test_some_are_taken_by_name_only(measured, name):
    """What keeps every score, and what would run a C++ compiler."""
    measured(128, {name: 1.0, "flash": 9.0}, step="inference")
    assert _name(choose(_call(128, 128), "auto")) == "flash"


def test_a_measurement_counts_for_its_own_case_only(measured):
    measured(128, {"blocks": 1.0, "flash": 2.0}, kind="window")
    window = Masks(window=9)
    assert _name(choose(_call(128, 128, masks=window, training=True), "auto")) == "blocks"
    assert _name(choose(_call(128, 128, masks=window), "auto")) == "flash"
    assert _name(choose(_call(128, 128, training=True), "auto")) == "flash"
    double = _call(128, 128, torch.float64, masks=window, training=True)
    assert _name(choose(double, "auto")) == "flash"
    assert not choice.rank("cuda", torch.float32, "window", "training", 7, 7)[1]


def test_training_is_a_gradient_that_somebody_asks_for(measured):
    measured(128, {"blocks": 1.0, "flash": 2.0}, step="training")
    measured(128, {"flash": 1.0, "blocks": 2.0}, step="inference")
    assert _name(choose(_call(training=True), "auto")) == "blocks"
    with torch.no_grad():
        assert _name(choose(_call(training=True), "auto")) == "flash"
    learned = _call()._replace(sink_logits=torch.zeros(1, 2, 1, requires_grad=True))
    assert _name(choose(learned, "auto")) == "blocks"


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", PASSES)
@pytest.mark.parametrize("bits", [0, 12, 13, 20])
def test_every_rank_ends_with_what_serves_every_call(device, kind, step, bits):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        names, _ = choice.rank(device, dtype, kind, step, bits, bits)
        assert "blocks" in names
        assert len(set(names)) == len(names)
        assert set(names) <= set(BACKENDS)
        assert "reference" not in names


def test_any_long_input_is_served_in_blocks():
    long = torch.zeros(1, 1, 4097, 8)
    query = long[:, :, :1]
    assert sink_attention(query, long, long, 0.0, dropout_p=0.5).shape == (1, 1, 1, 8)
    assert _name(choose(_call(1, 4097, dropout_p=0.5), "auto")) == "blocks"


@pytest.mark.parametrize("path", sorted(choice.MEASURED.glob("*.json")), ids=lambda path: path.stem)
def test_the_tables_in_the_repository(path):
    table = json.loads(path.read_text())
    assert set(table) >= {"measurements", "versions", "hardware", "date", "command"}
    assert table["measurements"]
    for row in table["measurements"]:
        assert row["device"] == path.stem
        assert isinstance(getattr(torch, row["dtype"]), torch.dtype)
        assert row["kind"] in KINDS
        assert row["pass"] in PASSES
        assert (row["q_len"] == 1) == (row["pass"] == "decode")
        assert row["kv_len"] >= row["q_len"]
        assert set(row["milliseconds"]) <= set(BACKENDS)
        assert min(row["milliseconds"].values()) > 0


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


def test_while_compiling_the_lengths_are_not_asked_for(measured):
    """What is slow at the length that stands for all is not taken, however short the input."""
    measured(64, {"blocks": 1.0, "flash": 2.0})
    measured(2048, {"flash": 1.0, "blocks": 2.0})
    torch._dynamo.reset()
    taken = []

    @torch.compile(fullgraph=True, backend="eager")
    def attend(query):
        call = Call(query, query, query, torch.zeros(1, 1, 1), NO_MASKS, 0.0, 1.0)
        return 1 if choose(call, "auto") is BACKENDS["flash"] else 0

    taken.append(attend(torch.zeros(1, 2, 64, 8, requires_grad=True)))
    assert taken == [1]


def test_a_growing_cache_does_not_search_the_table_again():
    choose(_call(1, 300), "auto")
    searches = choice.rank.cache_info().misses
    for kv_len in range(257, 513):
        choose(_call(1, kv_len), "auto")
    assert choice.rank.cache_info().misses == searches


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
