"""Outliers of hidden states against the hidden states that Transformers itself returns."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from stablemask.errors import InputError
from stablemask.evaluation.activations import hidden_state_outliers
from stablemask.inference.model import decoder_layers

from ..models.tiny import random_ids, tiny_model

LAYERS = 3


def tiny_llama():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, num_hidden_layers=LAYERS, **sizes)).eval()


def tiny_gpt2():
    config = GPT2Config(vocab_size=61, n_positions=32, n_embd=32, n_layer=LAYERS, n_head=2)
    return GPT2LMHeadModel(config).eval()


def tiny_opt():
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4, "word_embed_proj_dim": 32}
    config = OPTConfig(vocab_size=61, num_hidden_layers=LAYERS, max_position_embeddings=32, **sizes)
    return OPTForCausalLM(config).eval()


def front_token():
    return tiny_model(attention="learned-token", num_hidden_layers=LAYERS)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_opt, front_token])
def test_the_hidden_states_of_transformers(make):
    model, ids = make(), random_ids(5, 17)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    outliers = hidden_state_outliers(model, ids)
    assert outliers.largest.shape == (LAYERS,)
    later = 1 + (make is front_token)  # the first row of its states is that token's
    # The last of Transformers' states is behind the final normalisation, and no layer's own.
    for layer, state in enumerate(states[1:-1]):
        x = state.double()
        centred = x - x.mean()
        kurtosis = centred.pow(4).mean() / centred.pow(2).mean() ** 2
        torch.testing.assert_close(outliers.largest[layer], x.abs().max(), rtol=1e-5, atol=0)
        torch.testing.assert_close(
            outliers.largest_later[layer], x[:, later:].abs().max(), rtol=1e-5, atol=0
        )
        torch.testing.assert_close(outliers.kurtosis[layer], kurtosis, rtol=1e-5, atol=0)


@pytest.mark.parametrize("make", [tiny_llama, front_token])
def test_a_planted_outlier_is_found_on_the_first_token(make):
    model = make()
    model.model.embed_tokens.weight.data[7, 3] = 500.0
    ids = torch.cat((torch.full((2, 1), 7), torch.full((2, 15), 8)), dim=1)
    outliers = hidden_state_outliers(model, ids)
    assert (outliers.largest > 400).all()
    assert (outliers.largest_later < 40).all()
    assert (outliers.kurtosis > 100).all()


def test_our_decoder_in_half_precision_is_left_as_it_was():
    model = tiny_model(torch.bfloat16, attention_dropout=0.5).train()
    ids = random_ids(2, 16)
    first, second = hidden_state_outliers(model, ids), hidden_state_outliers(model, ids)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert first.kurtosis.dtype == torch.float64
    assert model.training
    assert all(not layer._forward_hooks for layer in decoder_layers(model))


def test_bad_inputs():
    with pytest.raises(InputError, match=r"n of at least 2, got \(16,\)"):
        hidden_state_outliers(tiny_llama(), random_ids(16))
    with pytest.raises(InputError, match=r"n of at least 2, got \(3, 1\)"):
        hidden_state_outliers(tiny_llama(), random_ids(3, 1))
    with pytest.raises(InputError, match="token id 61"):
        hidden_state_outliers(tiny_llama(), torch.full((1, 4), 61))
    with pytest.raises(InputError, match=r"33 positions.* has 32"):
        hidden_state_outliers(tiny_opt(), random_ids(1, 33))
    model = tiny_llama()
    model.config.num_hidden_layers = 5
    with pytest.raises(InputError, match="LlamaForCausalLM has no list of 5 decoder layers"):
        hidden_state_outliers(model, random_ids(1, 4))
