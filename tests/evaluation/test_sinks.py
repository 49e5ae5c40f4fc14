"""Attention maps against the module's own output, and what is read off them."""

import math

import pytest
import torch

from stablemask import pseudo_logsumexp
from stablemask.errors import InputError
from stablemask.evaluation import (
    AttentionMaps,
    attention_maps,
    first_token_attention,
    identical_token_spread,
    real_share,
)
from stablemask.models.configuration import POSITION_ENCODINGS

from ..models.tiny import DESIGNS, random_ids, tiny_model

LENGTH = 23


@pytest.mark.parametrize(("position", "kind"), DESIGNS)
def test_maps_sum_to_one_and_give_the_output_of_the_module(position, kind):
    torch.manual_seed(0)
    model = tiny_model(position_encoding=position, attention=kind)
    ids = random_ids(LENGTH)
    inputs, attended = [], []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.append((args[0], kwargs["rotary"])),
            with_kwargs=True,
        )
        layer.self_attn.o_proj.register_forward_pre_hook(
            lambda module, args: attended.append(args[0])
        )
    maps = attention_maps(model, ids)

    assert maps.real.shape == (2, 4, LENGTH, LENGTH)
    assert maps.pseudo.shape == (2, 4, LENGTH)
    assert (maps.real.triu(1) == 0).all()
    torch.testing.assert_close(maps.real.sum(-1) + maps.pseudo, torch.ones(2, 4, LENGTH))
    for layer, real, pseudo, (hidden, rotary), output in zip(
        model.model.layers, maps.real, maps.pseudo, inputs, attended, strict=True
    ):
        module = layer.self_attn
        value = module.project(hidden, rotary)[2][0].repeat_interleave(2, dim=0)
        expected = output[0].detach().unflatten(-1, (4, -1)).transpose(0, 1)[:, -LENGTH:]
        found = real @ value[:, -LENGTH:].detach()
        if module.has_front:
            found = found + pseudo[..., None] * value[:, :1].detach()
        if module.head_gate is not None:
            found = found * module.head_gate(hidden)[0].sigmoid().T[..., None].detach()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_mask_ratio_is_that_of_the_method():
    model = tiny_model(stablemask={"gamma": "slopes", "horizon": 30}, position_encoding="nope")
    for layer in model.model.layers:  # equal scores: Z is the number of visible tokens
        layer.self_attn.q_proj.weight.data.zero_()
    maps = attention_maps(model, random_ids(1, LENGTH))
    slopes = torch.tensor([2.0 ** (-8 * (head + 1) / 4) for head in range(4)])
    mass = pseudo_logsumexp(torch.arange(LENGTH), slopes, 30).exp()
    expected = mass / (mass + torch.arange(1, LENGTH + 1))
    torch.testing.assert_close(maps.pseudo, expected.expand(2, 4, LENGTH))


def test_half_precision_models_give_float32_maps():
    maps = attention_maps(tiny_model(torch.bfloat16), random_ids(LENGTH))
    assert maps.real.dtype == torch.float32
    torch.testing.assert_close(maps.real.sum(-1) + maps.pseudo, torch.ones(2, 4, LENGTH))


def test_statistics():
    real = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.25, 0.0], [0.25, 0.25, 0.0]])
    maps = AttentionMaps(
        torch.stack([real, 0.5 * real])[:, None], torch.stack([1 - real.sum(-1)] * 2)[:, None]
    )
    assert first_token_attention(maps).tolist() == [0.375, 0.1875]
    assert real_share(maps) == pytest.approx(0.75 * (1 + 0.75 + 0.5) / 3)


def test_maps_leave_the_model_as_it_was():
    model = tiny_model(attention_dropout=0.5).train()
    ids = random_ids(LENGTH)
    first, second = attention_maps(model, ids), attention_maps(model, ids)
    assert torch.equal(first.real, second.real)
    assert model.training
    assert all(not layer.self_attn._forward_pre_hooks for layer in model.model.layers)


@pytest.mark.parametrize("position", POSITION_ENCODINGS)
def test_identical_tokens_are_the_hidden_states_of_the_model(position):
    model = tiny_model(position_encoding=position)
    outputs, spread = identical_token_spread(model, 16, 3)
    with torch.no_grad():
        expected = model.model(torch.full((1, 16), 3)).last_hidden_state[0]
    assert torch.equal(outputs, expected)
    assert math.isclose(spread, (expected - expected[0]).abs().max().item())


def test_bad_inputs():
    model = tiny_model(position_encoding="learned")
    with pytest.raises(InputError, match=r"one sequence.*\(2, 8\)"):
        attention_maps(model, random_ids(2, 8))
    with pytest.raises(InputError, match=r"33 positions.* has 32"):
        attention_maps(model, random_ids(33))
    with pytest.raises(InputError, match=r"33 positions.* has 32"):
        identical_token_spread(model, 33)
    with pytest.raises(InputError, match="length must be at least 1, got 0"):
        identical_token_spread(model, 0)
    with pytest.raises(InputError, match="token id 61"):
        identical_token_spread(model, 8, 61)
    with pytest.raises(InputError, match="got Linear"):
        attention_maps(torch.nn.Linear(1, 1), random_ids(8))
