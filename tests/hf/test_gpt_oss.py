"""Models with learned sinks of their own: theirs alone, and with the pseudo mass beside them."""

import pytest
import torch
import transformers

import stablemask.hf  # noqa: F401

from .families import EXPERTS, MIXED, WINDOW, Family

EPS = torch.finfo(torch.float32).eps
LENGTH = 13  # the window is 5

SINKS = [
    Family("gpt-oss", "GptOssForCausalLM", MIXED | EXPERTS | {"head_dim": 8}),
    Family("Granite", "GraniteSWAForCausalLM", MIXED),
    Family("Granite MoE", "GraniteMoeSWAForCausalLM", MIXED | EXPERTS),
    Family("Flint", "FlintForCausalLM", WINDOW | EXPERTS | {"head_dim": 8}),
    Family("MiMo V2", "MiMoV2FlashForCausalLM", MIXED | EXPERTS | {"head_dim": 8}),
]
families = pytest.mark.parametrize(
    "family",
    [family for family in SINKS if hasattr(transformers, family.model)],  # some are new
    ids=lambda family: family.name,
)


def pair(family, dtype=torch.float64, **more):
    """One model with our attention and one with its own eager attention, of the same weights."""
    build = family.model_class._from_config
    model = build(family.config(**more), attn_implementation="stablemask").to(dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    eager = build(family.config(), attn_implementation="eager").to(dtype).eval()
    eager.load_state_dict(model.state_dict())
    return model, eager


def inputs(pad):
    real = torch.ones(2, LENGTH, dtype=torch.long)
    real[1, LENGTH - pad :] = 0
    input_ids = torch.randint(3, 61, real.shape)
    labels = input_ids.where(real.bool(), -100)
    return {"input_ids": input_ids, "labels": labels, "attention_mask": real}


@families
@pytest.mark.parametrize("pad", [0, 4])
def test_logits_and_gradients_equal_the_models_own_attention(family, pad):
    model, eager = pair(family)
    batch = inputs(pad)
    ours, theirs = (m(**batch, use_cache=False) for m in (model, eager))
    real = batch["attention_mask"].bool()
    scale = theirs.logits.abs().max()
    assert (ours.logits - theirs.logits)[real].abs().max() < 64 * EPS * scale
    ours.loss.backward()
    theirs.loss.backward()
    expected = {name: p.grad for name, p in eager.named_parameters() if p.grad is not None}
    scale = max(gradient.abs().max() for gradient in expected.values())
    sinks = 0
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(
                parameter.grad, expected[name], rtol=0, atol=64 * EPS * scale
            )
        if name.endswith("sinks"):
            sinks += 1
            gradient = expected[name]
            assert gradient.abs().min() > 0
            torch.testing.assert_close(parameter.grad, gradient, rtol=64 * EPS, atol=EPS * scale)
    assert sinks


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_generate_equals_the_models_own_attention(cache):
    model, eager = pair(SINKS[0])
    real = torch.ones(2, LENGTH, dtype=torch.long)
    real[1, :4] = 0
    prompt = torch.randint(3, 61, real.shape)
    settings = {"attention_mask": real, "max_new_tokens": 8, "do_sample": False}
    tokens = model.generate(prompt, **settings, **cache)
    assert tokens.equal(eager.generate(prompt, **settings))


def test_bfloat16_is_no_further_off_than_the_models_own_attention():
    """The experts route tokens by rounded numbers, so one layer's attention is compared."""
    model, eager = pair(SINKS[0], torch.bfloat16)
    _, exact = pair(SINKS[0])
    exact.load_state_dict({name: tensor.double() for name, tensor in eager.state_dict().items()})
    hidden = torch.randn(2, LENGTH, 32).bfloat16()
    position_ids = torch.arange(LENGTH)[None]
    outputs = []
    for whole in (model, eager, exact):
        decoder, layer = whole.model, whole.model.layers[1].self_attn  # full attention
        states = hidden.to(layer.sinks.dtype).requires_grad_()
        rotary = decoder.rotary_emb(states, position_ids)
        mask = None
        if whole is not model:
            mask = torch.full((LENGTH, LENGTH), -torch.inf, dtype=states.dtype).triu(1)
        out = layer(states, rotary, mask, position_ids=position_ids)[0]
        grad = torch.ones_like(out)
        sink, state = torch.autograd.grad(out, (layer.sinks, states), grad)
        outputs.append([tensor.detach().double() for tensor in (out, sink, state)])
    for ours, theirs, truth in zip(*outputs):
        roundings = 4 * torch.finfo(torch.bfloat16).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() + roundings


def test_layers_without_sinks_stay_plain_unless_the_pseudo_mass_is_asked_for():
    """MiMo V2 has sinks in its sliding layers only."""
    family = SINKS[-1]
    plain, eager = pair(family)
    asked = family.model_class(family.config(stablemask={"gamma": 0.1})).double().eval()
    asked.load_state_dict(plain.state_dict())
    ids = torch.randint(3, 61, (1, LENGTH))
    truth = eager(ids).logits
    assert (plain(ids).logits - truth).abs().max() < 64 * EPS * truth.abs().max()
    assert (asked(ids).logits - truth).abs().max() > 0.01
