"""Every way in which people run a Transformers model gives what the plain forward pass gives."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

from stablemask.hf import apply_stablemask
from stablemask.models.cache import CACHE
from tests import marks

from .families import EXPERTS, MIXED, Family

EPS = torch.finfo(torch.float32).eps
LLAMA = Family("Llama", "LlamaForCausalLM")
NEOX = Family("GPT-NeoX", "GPTNeoXForCausalLM")
GRANITE = Family("Granite with sinks", "GraniteSWAForCausalLM", MIXED)
GPT_OSS = Family("gpt-oss", "GptOssForCausalLM", MIXED | EXPERTS | {"head_dim": 8})
SETTINGS = {
    "gamma": [0.3, 0.1, 0.05, 0.2],
    "start": 1,
    "shift": [[0.3, -1.0, 2.0, 0.0], [1.5, -0.5, 0.25, -3.0]],
}


def build(family, dtype=torch.float64, num_hidden_layers=2):
    settings = copy.deepcopy(SETTINGS)
    settings["shift"] = settings["shift"][:num_hidden_layers]
    config = family.config(stablemask=settings, num_hidden_layers=num_hidden_layers)
    return family.model_class(config).to(dtype).eval()


def random_ids(*shape):
    return torch.randint(3, 61, shape)


def loss_and_gradients(model, ids, **inputs):
    model.zero_grad()
    loss = model(ids, labels=ids, use_cache=False, **inputs).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def left_padding(ids, pad):
    mask = torch.ones_like(ids)
    mask[1, :pad] = 0
    return {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}


@pytest.mark.parametrize(("family", "pad"), [(LLAMA, 0), (GRANITE, 4)])
def test_compiled_as_one_graph(family, pad):
    model = build(family)
    torch.compiler.reset()  # all models share the code that is counted against its limit
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    ids = random_ids(2, 11)
    inputs = left_padding(ids, pad) if pad else {}
    ours, theirs = (loss_and_gradients(m, ids, **inputs) for m in (compiled, model))
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=64 * EPS)
    gradients = {name.removeprefix("_orig_mod."): gradient for name, gradient in ours[1].items()}
    torch.testing.assert_close(gradients, theirs[1], rtol=0, atol=64 * EPS)


def test_compiled_decoding_with_a_static_cache_follows_positions_and_settings():
    model = build(LLAMA, num_hidden_layers=1)
    ids = random_ids(1, 9)
    truth = model(ids).logits
    torch.compiler.reset()  # all models share the code that is counted against its limit
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = StaticCache(model.config, max_cache_len=16)
    with torch.no_grad():
        logits = [model(ids[:, :4], **{CACHE: cache}).logits]
        logits += [compiled(ids[:, [i]], **{CACHE: cache}).logits for i in range(4, 9)]
        torch.testing.assert_close(torch.cat(logits, 1), truth, rtol=0, atol=64 * EPS * 8)
        plain = compiled(ids).logits
        model.config.stablemask["shift"][0][1] = 4.0
        assert (compiled(ids).logits - plain).abs().max() > 0.01
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", [LLAMA, GPT_OSS], ids=lambda family: family.name)
def test_gradient_checkpointing(family, reentrant):
    model = build(family).train()
    ids = random_ids(2, 11)
    inputs = left_padding(ids, 4)
    truth = loss_and_gradients(model, ids, **inputs)
    settings = {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)
    torch.testing.assert_close(loss_and_gradients(model, ids, **inputs), truth, rtol=0, atol=0)


def test_autocast_to_bfloat16():
    """Llama then hands over float32 query and key beside bfloat16 values."""
    model = build(LLAMA, torch.float32)
    ids = random_ids(2, 11)
    truth = model(ids, labels=ids).loss
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert (loss - truth).abs() < 0.05
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@marks.torchao
def test_int8_weights():
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = build(LLAMA, torch.float32)
    dense = copy.deepcopy(model)
    quantize_(model, Int8WeightOnlyConfig())
    for name, layer in dense.named_modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data = model.get_submodule(name).weight.dequantize()
    ids = random_ids(2, 11)
    with torch.no_grad():
        logits, truth = model(ids).logits, dense(ids).logits
    assert (logits - truth).abs().max() < 64 * EPS * truth.abs().max()


@pytest.mark.parametrize("places", ["auto", "cpu", "disk"])
def test_device_maps(places, tmp_path):
    pytest.importorskip("accelerate")
    model = build(LLAMA, torch.float32)
    model.save_pretrained(tmp_path / "model")
    ids = random_ids(2, 11)
    mask = left_padding(ids, 4)
    given = {"device_map": places}
    if places == "disk":  # the second layer is read when it is run
        parts = (
            "model.embed_tokens",
            "model.layers.0",
            "model.norm",
            "model.rotary_emb",
            "lm_head",
        )
        given["device_map"] = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"}
        given["offload_folder"] = tmp_path / "offload"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **given)
    assert loaded.config._attn_implementation == "stablemask"
    assert loaded(ids, **mask).logits.equal(model(ids, **mask).logits)
    tokens = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask["attention_mask"]}
    assert loaded.generate(ids, **tokens).equal(model.generate(ids, **tokens))


def test_a_copy_in_lower_precision_keeps_the_mass_in_float32():
    """log M of a small gamma differs between positions by less than bfloat16 can hold."""
    model = apply_stablemask(build(NEOX), gamma=1e-3)
    low = copy.deepcopy(model).bfloat16()
    ids = random_ids(1, 40)
    exact = copy.deepcopy(low).double()
    error = (low(ids).logits.double() - exact(ids).logits).abs().max()
    softmax = copy.deepcopy(low)
    softmax.config.stablemask["shift"] = -60.0
    exact.config.stablemask["shift"] = -60.0
    softmax_error = (softmax(ids).logits.double() - exact(ids).logits).abs().max()
    assert error < 2 * softmax_error
