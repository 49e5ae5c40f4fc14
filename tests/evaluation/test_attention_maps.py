"""Captured attention against Transformers' own weights, and against the dense definition."""

import math
import weakref

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from stablemask.errors import InputError
from stablemask.evaluation import (
    attention_maps,
    capture_attention,
    identical_token_spread,
    layer_statistics,
    reduce_attention,
)
from stablemask.hf import apply_stablemask

from ..models.tiny import random_ids, tiny_model
from .families import CAPTURED, tiny_transformer

LENGTH = 23
EPS = torch.finfo(torch.float32).eps


def eager_maps(family: str, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Transformers' own weights, (L, H, n, n)."""
    model = tiny_transformer(family, dtype, "eager")
    with torch.no_grad():
        attentions = model(ids[None], output_attentions=True, use_cache=False).attentions
    return torch.cat(attentions)


@pytest.mark.parametrize("family", CAPTURED)
def test_maps_are_those_of_eager_attention(family):
    ids = random_ids(LENGTH)
    truth = eager_maps(family, ids, torch.float64)
    reference = eager_maps(family, ids, torch.float32)
    maps = attention_maps(tiny_transformer(family), ids)
    assert maps.real.shape == (3, 4, LENGTH, LENGTH)
    # Twice as far from float64 as eager attention in float32, and four roundings.
    allowed = 2 * (reference - truth).abs().max() + 4 * EPS
    assert (maps.real - truth).abs().max() <= allowed
    torch.testing.assert_close(maps.real.sum(-1) + maps.pseudo, torch.ones(3, 4, LENGTH))
    assert (maps.pseudo > 0).all() if family == "GptOss" else (maps.pseudo == 0).all()


@pytest.mark.parametrize(
    ("family", "stable"),
    [(family, False) for family in CAPTURED]
    + [(family, True) for family in CAPTURED if family != "Gemma2"],  # soft-capping: softmax only
)
def test_a_captured_model_computes_what_it_computes_elsewhere(family, stable):
    model = tiny_transformer(family)
    if stable:
        apply_stablemask(model, gamma=[0.01, 0.1, 0.3, 1.0], start=1)
    if family == "Gemma2":
        model.set_attn_implementation("eager")  # an older Transformers leaves the cap out of SDPA
    ids = random_ids(1, LENGTH)
    with torch.no_grad():
        before = model(ids).logits
        with capture_attention(model, lambda layer: None):
            captured = model(ids, use_cache=False).logits
        after = model(ids).logits
    assert torch.equal(before, after)
    torch.testing.assert_close(captured, before, atol=1e-4, rtol=1e-4)


def define(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """``(softmax(s * C + P) * C) @ v`` over ``horizon`` columns, written out in float64."""
    n, settings = query.shape[2], module.settings
    columns = torch.arange(settings["horizon"])
    key, value = (t.double().repeat_interleave(4 // t.shape[1], dim=1) for t in (key, value))
    scores = torch.zeros(1, 4, n, settings["horizon"], dtype=torch.float64)
    scores[..., :n] = query.double() @ key.mT * scaling
    causal = columns <= torch.arange(n)[:, None]
    rate = torch.tensor(settings["gamma"], dtype=torch.float64)[:, None, None]
    shift = settings["shift"]
    if isinstance(shift, list):
        shift = torch.tensor(shift[module.layer_idx], dtype=torch.float64)[:, None, None]
    pseudo = (-rate * columns + shift).expand(4, n, -1).clone()
    pseudo[:, : settings["start"]] = -math.inf
    shares = torch.softmax(torch.where(causal, scores, pseudo), -1)
    real = torch.where(causal, shares, 0.0)[..., :n]
    module.shares = real[0], torch.where(causal, 0.0, shares).sum(-1)[0]
    return (real @ value).to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register("test_definition", define)
AttentionMaskInterface.register("test_definition", sdpa_mask)


def defined_maps(family, ids, dtype, settings) -> tuple[torch.Tensor, torch.Tensor]:
    model = tiny_transformer(family, dtype, "test_definition")
    layers = [module for module in model.modules() if hasattr(module, "is_causal")]
    for module in layers:
        module.settings = settings
    with torch.no_grad():
        model(ids[None], use_cache=False)
    return tuple(torch.stack(shares) for shares in zip(*(module.shares for module in layers)))


@pytest.mark.parametrize("family", ["Llama", "GPTNeoX", "GPT2"])
@pytest.mark.parametrize(("start", "shift"), [(0, 0.0), (1, -2.0), (0, "of each")])
def test_stablemask_maps_are_the_definition(family, start, shift):
    if shift == "of each":
        layers = tiny_transformer(family).config.num_hidden_layers
        shift = [[layer - 0.5, 1.0, -3.0, layer * 0.25] for layer in range(layers)]
    settings = {"gamma": [0.01, 0.1, 0.3, 1.0], "horizon": 40, "start": start, "shift": shift}
    ids = random_ids(LENGTH)
    truths = defined_maps(family, ids, torch.float64, settings)
    references = defined_maps(family, ids, torch.float32, settings)
    maps = attention_maps(apply_stablemask(tiny_transformer(family), **settings), ids)
    for shares, truth, reference in zip(maps, truths, references, strict=True):
        allowed = 2 * (reference - truth).abs().max() + 4 * EPS
        assert (shares - truth).abs().max() <= allowed
    assert (maps.pseudo[:, :, 0] == 0).all() == (start == 1)


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize("kind", ["learned-token", "fixed-token"])
def test_what_a_front_token_gets_is_of_none_of_the_text(kind, position):
    """As in a softmax model that reads it as one more token, 0, whose embedding is its."""
    model = tiny_model(torch.float64, attention=kind, position_encoding=position)
    softmax = tiny_model(torch.float64, attention="softmax", position_encoding=position)
    softmax.load_state_dict(model.state_dict(), strict=False)
    front = torch.full((32,), 0.3) if kind == "fixed-token" else model.model.front_token
    softmax.get_input_embeddings().weight.data[0] = front
    ids = random_ids(LENGTH)
    maps = attention_maps(model, ids)
    whole = attention_maps(softmax, torch.cat((torch.zeros(1, dtype=ids.dtype), ids))).real
    torch.testing.assert_close(maps.real, whole[:, :, 1:, 1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(maps.pseudo, whole[:, :, 1:, 0], rtol=0, atol=1e-5)


def test_a_row_that_sees_nothing_beside_a_sink_of_nothing_gives_nothing():
    model, layers = tiny_transformer("Llama"), []
    mask = torch.tensor([[0, 0, 0, 1, 1, 1]])  # rows of padding on the left
    with torch.no_grad(), capture_attention(model, layers.append):
        model(random_ids(1, 6), attention_mask=mask, use_cache=False)
    for layer in layers:
        given = layer.real[0].sum(-1) + layer.pseudo[0]
        torch.testing.assert_close(given, mask.expand(4, -1).float())


@pytest.mark.parametrize("make", [lambda: tiny_transformer("Llama"), tiny_model])
def test_statistics_are_those_of_the_maps(make):
    model, ids = make(), random_ids(LENGTH)
    maps, statistics = attention_maps(model, ids), layer_statistics(model, ids)
    for number, (layer, real, pseudo) in enumerate(zip(statistics, *maps, strict=True)):
        assert layer.layer == number
        assert torch.equal(layer.pseudo, pseudo)
        torch.testing.assert_close(layer.first_token, real[:, 1:, 0].mean(-1))
        for token in range(LENGTH - 1):
            expected = real[:, token + 1 :, token].mean(-1)
            torch.testing.assert_close(layer.received[:, token], expected)


@pytest.mark.parametrize("make", [lambda: tiny_transformer("Llama"), tiny_model])
def test_a_layer_is_let_go_before_the_next_is_made(make):
    seen = []

    def reduce(layer):
        assert all(ref() is None for ref in seen)
        seen.append(weakref.ref(layer.real))
        return layer.layer

    layers = reduce_attention(make(), random_ids(LENGTH), reduce)
    assert layers == list(range(len(seen)))


def test_the_attention_comes_back_after_an_error():
    model = tiny_transformer("Llama")

    def fail(layer):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reduce_attention(model, random_ids(LENGTH), fail)
    assert model.config._attn_implementation == "sdpa"
    assert attention_maps(model, random_ids(LENGTH)).real.isfinite().all()


def test_softmax_of_any_family_cannot_tell_identical_tokens_apart():
    assert identical_token_spread(tiny_transformer("Llama"), 32, 3).spread < 1e-4
    stable = apply_stablemask(tiny_transformer("Llama"))
    assert identical_token_spread(stable, 32, 3).spread > 1e-2


@pytest.mark.parametrize("family", ["Bloom", "Falcon"])
def test_a_family_that_computes_its_attention_itself(family):
    model = tiny_transformer(family)
    with pytest.raises(InputError, match=rf"{family}.* cannot be captured"):
        attention_maps(model, random_ids(LENGTH))


def test_bad_inputs():
    with pytest.raises(InputError, match=r"at least 2 tokens, got 1"):
        layer_statistics(tiny_transformer("Llama"), random_ids(1))
    with pytest.raises(InputError, match=r"65 positions.* has 64"):
        attention_maps(tiny_transformer("GPT2"), random_ids(65))
