"""Exported graphs: the model's logits at every batch and length, in PyTorch, in a fresh process, in ONNX Runtime."""

import subprocess
import sys
from itertools import pairwise
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from stablemask.errors import InputError
from stablemask.hf import apply_stablemask
from stablemask.inference import export
from stablemask.inference.export import export_onnx, export_program, export_pt2, load_onnx

from .. import marks
from ..models.tiny import random_ids, tiny_config, tiny_model

SHIFT = [[0.5, -1.0, 2.0, 0.0], [1.5, -0.5, 0.25, -3.0]]
# (batch, past, length); traced with others.
SHAPES = [(1, 0, 1), (2, 0, 9), (3, 5, 1), (1, 1, 6), (2, 4, 4)]


def tiny_llama():
    torch.manual_seed(0)
    sizes = tiny_config().to_dict()
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "initializer_range",
    )  # fmt: skip
    config = LlamaConfig(**{name: sizes[name] for name in names})
    model = LlamaForCausalLM(config).eval()
    return apply_stablemask(model, gamma=[0.3, 0.1, 0.03, 0.01], start=1, shift=SHIFT)


def ours():
    return tiny_model(stablemask={"shift": SHIFT})


def padded(batch, length):
    """Ids and mask, every row but the last left-padded by its number."""
    ids = random_ids(batch, length)
    start = torch.arange(batch - 1, -1, -1)[:, None].clamp(max=length - 1)
    return ids, (torch.arange(length) >= start).long()


def logits_alone(model, ids, mask):
    """Each text by itself, without its padding."""
    with torch.no_grad():
        return [model(row[m.bool()][None]).logits[0] for row, m in zip(ids, mask, strict=True)]


def assert_equals_each_alone(logits, model, ids, mask):
    """In a batch, up to the rounding of sums over another number of keys."""
    for row, alone in zip(logits, logits_alone(model, ids, mask), strict=True):
        torch.testing.assert_close(row[-len(alone) :], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [ours, tiny_llama])
def test_a_program_of_the_flash_operator_gives_the_logits_of_each_text_alone(make):
    model = make()
    program = export_program(model).run_decompositions()
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("stablemask.flash_forward.default") == model.config.num_hidden_layers
    graph = program.module()
    for batch, _, length in SHAPES:
        ids, mask = padded(batch, length)
        (logits,) = graph(ids, mask)
        assert_equals_each_alone(logits, model, ids, mask)


@pytest.mark.parametrize("make", [ours, tiny_llama])
def test_a_program_with_a_cache_goes_on_where_it_stopped(make):
    model = make()
    graph = export_program(model, cache=True).module()
    for batch, past, length in SHAPES:
        ids, mask = padded(batch, past + length)
        cache = [torch.zeros(batch, 2, 0, 8)] * 4
        if past:
            _, *cache = graph(ids[:, :past], mask[:, :past], cache)
        logits, *cache = graph(ids[:, past:], mask, cache)
        assert cache[0].shape == (batch, 2, past + length, 8)
        for row, alone in zip(logits, logits_alone(model, ids, mask), strict=True):
            seen = min(length, len(alone))
            torch.testing.assert_close(row[-seen:], alone[-seen:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "kind",
    [
        "stablemask-paper",
        "key-sink",
        "learned-token",
        "head-gate",
        pytest.param("stablemask-zero", marks=marks.nightly),
        pytest.param("fixed-token", marks=marks.nightly),
    ],
)
def test_a_program_of_each_kind_of_attention_decodes_past_the_training_length(kind):
    model = tiny_model(attention=kind, num_hidden_layers=1, max_position_embeddings=6)
    graph = export_program(model, cache=True).module()
    ids, mask = padded(3, 9)
    alone = logits_alone(model, ids, mask)
    cache = [torch.zeros(3, 2, 0, 8)] * 2
    for start, end in pairwise((0, 5, 8, 9)):
        logits, *cache = graph(ids[:, start:end], mask[:, :end], cache)
        for row, whole in zip(logits, alone, strict=True):
            padding = ids.shape[1] - len(whole)
            expected = whole[max(start - padding, 0) : end - padding]
            torch.testing.assert_close(row[-len(expected) :], expected, rtol=1e-4, atol=1e-4)


def test_files_are_read_in_a_fresh_process(tmp_path):
    model = tiny_llama()
    export_pt2(model, tmp_path / "any.pt2")
    export_pt2(model, tmp_path / "fixed.pt2", shape=(2, 9))
    ids, mask = padded(2, 9)
    np.savez(tmp_path / "inputs.npz", ids=ids.numpy(), mask=mask.numpy())
    code = (
        "import sys, numpy, torch, stablemask.hf\n"
        "given = numpy.load('inputs.npz')\n"
        "inputs = torch.from_numpy(given['ids']), torch.from_numpy(given['mask'])\n"
        "for name in ('any', 'fixed'):\n"
        "    (logits,) = torch.export.load(f'{name}.pt2').module()(*inputs)\n"
        "    numpy.save(f'{name}.npy', logits.detach().numpy())\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    with torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
    for name in ("any", "fixed"):
        torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / f"{name}.npy")), expected)
    assert {path.name for path in tmp_path.iterdir()} == {
        "any.pt2", "fixed.pt2", "inputs.npz", "any.npy", "fixed.npy",
    }  # fmt: skip


def test_onnx_runtime_gives_the_logits_of_each_text_alone(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(export, "_WEIGHTS_IN_THE_FILE", 0)  # as for a large model
    model = tiny_model(num_hidden_layers=1)
    export_onnx(model, tmp_path / "model.onnx")
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}
    graph = load_onnx(tmp_path / "model.onnx")
    for batch, _, length in SHAPES:
        ids, mask = padded(batch, length)
        (logits,) = graph(ids, mask)
        assert_equals_each_alone(logits, model, ids, mask)


def test_onnx_runtime_decodes_as_generate(tmp_path):
    pytest.importorskip("onnxruntime")
    import onnx

    model = tiny_llama()
    export_onnx(model, tmp_path / "model.onnx", cache=True)
    described = onnx.load(tmp_path / "model.onnx")
    assert {node.domain for node in described.graph.node} == {""}
    assert [given.name for given in described.graph.input][:4] == [
        "input_ids", "attention_mask", "past_key_values.0.key", "past_key_values.0.value",
    ]  # fmt: skip
    axes = [
        dim.dim_param or dim.dim_value
        for dim in described.graph.input[2].type.tensor_type.shape.dim
    ]
    assert axes == ["batch", 2, "past_length", 8]

    graph = load_onnx(tmp_path / "model.onnx")
    ids, mask = padded(3, 6)
    expected = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    cache, new = [torch.zeros(3, 2, 0, 8)] * 4, ids
    for _ in range(12):
        logits, *cache = graph(new, mask, cache)
        new = logits[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
    assert torch.equal(ids, expected)


def test_a_graph_that_gives_nan_in_any_output_is_not_the_model():
    model = tiny_model(num_hidden_layers=1)

    def graph(*inputs):
        *right, last = export._Decoder(model)(*inputs)
        return *right, last * torch.nan

    assert np.isnan(export.largest_difference(model, graph, cache=True))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("dynamic", "the dynamic RoPE of LlamaForCausalLM depends on the length of the text"),
        ("longrope", "the longrope RoPE .* does not; fix a length of at most 16"),
    ],
)
def test_frequencies_that_change_with_the_length(monkeypatch, kind, words):
    """A graph of a longrope Llama gives the logits of short texts alone, whatever the length."""
    more = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4} if kind == "longrope" else {}
    model = tiny_llama()
    model.config.rope_parameters = {
        "rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16, **more,
    }  # fmt: skip
    export_ = Mock(side_effect=RuntimeError("it is exported"))
    monkeypatch.setattr(torch.export, "export", export_)
    for shape in (None, (1, 17)):
        with pytest.raises(InputError, match=words):
            export_program(model, shape=shape)
    expected = RuntimeError if kind == "longrope" else InputError
    with pytest.raises(expected):
        export_program(model, shape=(1, 16))


def test_what_cannot_be_exported(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="only be fixed without a cache"):
        export_program(tiny_model(), cache=True, shape=(1, 4))
    bloom = BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(InputError, match="BloomForCausalLM takes no position_ids"):
        export_program(bloom)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[export\]'"):
        export_onnx(tiny_model(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
