"""Losses from a cache against a plain pass, and StreamingLLM against its recipe written out."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from stablemask.errors import InputError
from stablemask.evaluation.streaming import (
    compare_streaming,
    mean_and_error,
    position_bins,
    sink_cache,
    streaming_losses,
)
from stablemask.inference.streaming import mass_held, window_cache
from stablemask.models.positions import position_sink_logits
from stablemask.pseudo import head_decay_rates

from ..models.tiny import random_ids, tiny_model
from .families import tiny_transformer

WINDOW, SINKS = 9, 3
CLOSE = {"rtol": 0, "atol": 1e-4}  # logits near 10, losses in float32


def llama(family="Llama", **overrides):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        **overrides,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def losses_of_a_pass(model, ids):
    with torch.no_grad():
        logits = model(ids[:, :-1], use_cache=False).logits.float()
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


@pytest.mark.parametrize("chunk_size", [1, 7, 100])
def test_all_keys_are_a_plain_pass(chunk_size):
    model, ids = llama(), random_ids(2, 40)
    losses = streaming_losses(model, ids, DynamicCache(), chunk_size=chunk_size)
    torch.testing.assert_close(losses, losses_of_a_pass(model, ids), **CLOSE)


def turn(states, positions, theta=1e4):
    """RoPE as Su et al. write it: pairs of features as complex numbers, turned."""
    half = states.shape[-1] // 2
    pairs = torch.complex(states[..., :half], states[..., half:])
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = pairs * torch.polar(torch.ones(()).double(), positions[:, None] * frequency)
    return torch.cat((turned.real, turned.imag), dim=-1)


@torch.no_grad()
def streaming_llm(model, ids):
    """The recipe for one text, row by row: keys without positions, and a place for each it keeps."""
    config, decoder = model.config, model.model
    hidden = decoder.embed_tokens(ids)
    groups = config.num_attention_heads // config.num_key_value_heads
    for layer in decoder.layers:
        attention = layer.self_attn
        query, key, value = attention.project(layer.input_layernorm(hidden)[None])
        key, value = (t.repeat_interleave(groups, 1)[0] for t in (key, value))
        rows = []
        for row in range(len(ids)):
            kept = list(range(row + 1))
            if len(kept) > WINDOW:
                kept = kept[:SINKS] + kept[-(WINDOW - SINKS) :]
            place = torch.arange(len(kept))
            q, k = query[0, :, row : row + 1], key[:, kept]
            if config.position_encoding == "rope":
                q, k = turn(q, place[-1:]), turn(k, place)
            scores = (q @ k.mT)[:, 0] * attention.head_dim**-0.5
            if config.position_encoding == "alibi":
                slopes = head_decay_rates(config.num_attention_heads)
                scores = scores - slopes[:, None] * (place[-1] - place)
            mass = position_sink_logits(config, place[None, -1:])[0].exp().reshape(-1, 1)
            weights = scores.exp() / (scores.exp().sum(-1, keepdim=True) + mass)
            rows.append((weights[:, None] @ value[:, kept]).flatten())
        hidden = hidden + attention.o_proj(torch.stack(rows))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(decoder.norm(hidden))


@pytest.mark.parametrize("kind", ["softmax", "stablemask"])
@pytest.mark.parametrize("position", ["rope", "alibi", "nope"])
def test_streaming_llm_is_its_recipe(position, kind):
    model = tiny_model(torch.float64, position_encoding=position, attention=kind)
    ids = random_ids(2, 40)
    losses = streaming_losses(model, ids, sink_cache(model, WINDOW, num_sinks=SINKS), chunk_size=1)
    for text, of_text in zip(ids, losses, strict=True):
        expected = F.cross_entropy(
            streaming_llm(model, text[:-1]).float(), text[1:], reduction="none"
        )
        torch.testing.assert_close(of_text, expected, **CLOSE)
    plain = streaming_losses(model, ids, window_cache(model, WINDOW), chunk_size=8)
    assert torch.equal(
        losses[:, : WINDOW - 1].round(decimals=3), plain[:, : WINDOW - 1].round(decimals=3)
    )
    assert (losses - plain).abs().max() > 0.1


def test_without_sinks_a_relative_model_sees_its_plain_window():
    """Also through Transformers' own rotation; StableMask's mass, which is absolute, differs."""
    ids = random_ids(2, 40)
    # Of the last one's layers, one has no positions.
    for model in (
        llama(),
        tiny_model(attention="softmax"),
        llama("SmolLM3", no_rope_layers=[1, 0]),
    ):
        plain = streaming_losses(model, ids, window_cache(model, WINDOW), chunk_size=8)
        placed = streaming_losses(model, ids, sink_cache(model, WINDOW, num_sinks=0), chunk_size=1)
        torch.testing.assert_close(placed, plain, **CLOSE)
    model = tiny_model(stablemask={"gamma": 0.2})
    plain = streaming_losses(model, ids, window_cache(model, WINDOW), chunk_size=8)
    held = streaming_losses(model, ids, sink_cache(model, WINDOW, num_sinks=0), chunk_size=1)
    assert (held - plain).abs().max() > 0.1


def test_refusals():
    with pytest.raises(InputError, match="num_sinks must be from 0 to the window of 4 less 2"):
        sink_cache(llama(), 4, num_sinks=3)
    with pytest.raises(InputError, match="learned positions cannot be counted anew"):
        sink_cache(tiny_model(position_encoding="learned"), 8)
    scaled = llama()
    scaled.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(InputError, match="need RoPE of the default type"):
        sink_cache(scaled, 8)
    with pytest.raises(InputError, match="need RoPE of the default type"):
        sink_cache(tiny_transformer("GPT2"), 8)
    with pytest.raises(InputError, match="the RoPE of CohereForCausalLM cannot be counted anew"):
        sink_cache(llama("Cohere"), 8)  # whose pairs are neighbours
    with pytest.raises(ValueError, match="one at a time"):
        streaming_losses(llama(), random_ids(1, 9), sink_cache(llama(), 8), chunk_size=2)
    with pytest.raises(InputError, match="outside the model's vocabulary of 61"):
        streaming_losses(llama(), torch.tensor([[1, 61]]), DynamicCache(), chunk_size=1)


def test_the_prefix_is_read_and_not_scored():
    model, ids = llama(), random_ids(2, 20)
    read = torch.cat((torch.full((2, 1), 7), ids), dim=1)
    losses = streaming_losses(model, ids, DynamicCache(config=model.config), chunk_size=7, prefix=7)
    torch.testing.assert_close(losses, losses_of_a_pass(model, read)[:, 1:], **CLOSE)
    cache = DynamicCache(config=model.config)
    begins = streaming_losses(model, read, cache, chunk_size=7, prefix=7)
    torch.testing.assert_close(begins, losses_of_a_pass(model, read), **CLOSE)


@pytest.mark.parametrize("make", [llama, tiny_model])
def test_streaming_compared_is_each_cache_by_itself(make):
    model, ids = make(), random_ids(2, 31)
    found = compare_streaming(
        model, ids, window=WINDOW, num_sinks=SINKS, scored_from=12, prefix=7, progress=False
    )
    read = torch.cat((torch.full((2, 1), 7), ids), dim=1)
    caches = {
        "full": DynamicCache(config=model.config),
        "window": window_cache(model, WINDOW),
        "sinks": sink_cache(model, WINDOW, num_sinks=SINKS),
    }
    for name, cache in caches.items():
        with mass_held(model, WINDOW) if name == "window" else nullcontext():
            losses = streaming_losses(model, read, cache, chunk_size=1)
        assert getattr(found, name) == pytest.approx(losses[:, 12:].mean().item(), rel=1e-4)
    assert len({found.full, found.window, found.sinks}) == 3
    with pytest.raises(InputError, match="scored_from must be from 1 to 30, got 31"):
        compare_streaming(model, ids, window=WINDOW, scored_from=31)


def test_layers_with_frequencies_of_their_own():
    """Gemma 3 turns the keys of its sliding layers by others than those of its full ones."""
    parameters = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e1},
    }
    model = tiny_transformer("Gemma3", sliding_window=32, rope_parameters=parameters)
    ids = random_ids(2, 30)
    plain = streaming_losses(model, ids, window_cache(model, WINDOW), chunk_size=8)
    placed = streaming_losses(model, ids, sink_cache(model, WINDOW, num_sinks=0), chunk_size=1)
    torch.testing.assert_close(placed, plain, **CLOSE)
    with pytest.raises(InputError, match="RoPE of the default type, of whole heads"):
        sink_cache(tiny_transformer("GPTNeoX"), WINDOW)


def test_bins_cover_every_position_once():
    for length in (2, 3, 17, 8192):
        for per_octave in (1, 2, 5):
            bins = position_bins(length, per_octave)
            covered = [position for start, end in bins for position in range(start, end)]
            assert covered == list(range(1, length))
    assert position_bins(2048, 1, first=256) == [(256, 512), (512, 1024), (1024, 2048)]


def test_each_text_is_one_observation():
    losses = torch.tensor([[1.0, 3.0], [2.0, 2.0], [5.0, 5.0]])
    mean, error = mean_and_error(losses)
    assert mean == 3
    assert math.isclose(error, (3 / 3) ** 0.5)
