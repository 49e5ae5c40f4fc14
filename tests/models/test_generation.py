"""Generation is the same with a growing cache, a static one and none, alone and in a padded batch."""

from itertools import pairwise

import pytest
import torch
from transformers import DynamicCache, StaticCache

from stablemask.models.cache import CACHE, CACHE_NAMES

from .tiny import DESIGNS, FEW_DESIGNS, random_ids, tiny_model

NEW_TOKENS = 8
PAD = 0


def generate(model, input_ids, attention_mask, cache):
    options = {
        "dynamic": {},
        "static": {"cache_implementation": "static"},
        "none": {"use_cache": False},
    }[cache]
    tokens = model.generate(
        input_ids,
        attention_mask=attention_mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=PAD,
        **options,
    )
    return tokens[:, input_ids.shape[1] :].tolist()


def left_padded(prompts):
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), PAD)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = prompt
    return input_ids, (input_ids != PAD).long()


@pytest.mark.parametrize(("position", "kind"), FEW_DESIGNS)
def test_caches_and_padding_generate_the_same_tokens(position, kind):
    model = tiny_model(position_encoding=position, attention=kind)
    prompts = [random_ids(length) for length in (9, 4, 1)]
    alone = [generate(model, p[None], torch.ones(1, len(p)), "dynamic")[0] for p in prompts]
    assert (
        len({token for tokens in alone for token in tokens}) > 3
    )  # a constant would prove nothing
    for cache in ("static", "none"):
        assert generate(model, prompts[0][None], torch.ones(1, 9), cache)[0] == alone[0]
    for cache in ("dynamic", "static", "none"):
        assert generate(model, *left_padded(prompts), cache) == alone


@pytest.mark.parametrize(
    "stablemask",
    [
        {"gamma": "slopes"},
        {"gamma": 0.1, "horizon": 12},
        {"gamma": "slopes", "horizon": 12, "suffix": True},
        {"gamma": [0.0, 0.1, 1, 9], "horizon": 40},
        {"hold": 0, "shift": [[0.5, -1.0, 2.0, 0.0], [1.5, -0.5, 0.25, -3.0]]},
    ],
)
def test_caches_agree_for_other_settings(stablemask):
    model = tiny_model(stablemask=stablemask)
    prompts = [random_ids(length) for length in (9, 4)]
    alone = [generate(model, p[None], torch.ones(1, len(p)), "none")[0] for p in prompts]
    for cache in ("dynamic", "static"):
        assert generate(model, *left_padded(prompts), cache) == alone


@pytest.mark.parametrize("cache", ["dynamic", "static", "static, used before"])
@pytest.mark.parametrize(("position", "kind"), DESIGNS)
def test_logits_of_chunks_and_steps_equal_the_full_pass(position, kind, cache):
    model = tiny_model(torch.float64, position_encoding=position, attention=kind)
    input_ids = random_ids(2, 14)
    mask = torch.ones_like(input_ids)
    mask[1, :3] = 0
    with torch.no_grad():
        full = model(input_ids, attention_mask=mask).logits
        past = DynamicCache() if cache == "dynamic" else StaticCache(model.config, max_cache_len=20)
        if cache == "static, used before":
            model(input_ids, **{CACHE: past})
            past.reset()
        # A prefill, a chunk, then token by token.
        edges = [0, 6, 10, 11, 12, 13, 14]
        steps = [
            model(input_ids[:, a:b], attention_mask=mask[:, :b], **{CACHE: past}).logits
            for a, b in pairwise(edges)
        ]
    real = mask.bool()
    torch.testing.assert_close(torch.cat(steps, 1)[real], full[real], rtol=0, atol=1e-9)


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_a_static_cache_without_mask_equals_the_full_pass(position):
    model = tiny_model(torch.float64, position_encoding=position)
    input_ids = random_ids(2, 8)
    past = StaticCache(model.config, max_cache_len=20)
    with torch.no_grad():
        full = model(input_ids).logits
        edges = [0, 5, 6, 8]
        steps = [model(input_ids[:, a:b], **{CACHE: past}).logits for a, b in pairwise(edges)]
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=0, atol=1e-9)


def test_beam_search_and_prompt_lookup_agree_with_and_without_cache():
    model = tiny_model()
    input_ids = random_ids(1, 6)
    options = {"max_new_tokens": NEW_TOKENS, "pad_token_id": PAD, "eos_token_id": PAD}
    beams = [
        model.generate(input_ids, num_beams=3, use_cache=use_cache, **options).tolist()
        for use_cache in (True, False)
    ]
    assert beams[0] == beams[1]
    greedy = model.generate(input_ids, **options).tolist()
    assert model.generate(input_ids, prompt_lookup_num_tokens=3, **options).tolist() == greedy


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_cache_is_read_under_both_of_its_names(name):
    model = tiny_model(torch.float64)
    input_ids = random_ids(1, 7)
    with torch.no_grad():
        full = model(input_ids).logits
        past = DynamicCache(config=model.config)
        steps = [
            model(input_ids[:, a:b], **{name: past}).logits for a, b in ((0, 5), (5, 6), (6, 7))
        ]
        torch.testing.assert_close(torch.cat(steps, 1), full, rtol=0, atol=1e-9)
        hidden = model.model(input_ids[:, :1], **{name: past}).last_hidden_state
    assert past.get_seq_length() == 8
    assert (hidden - model.model(input_ids[:, :1]).last_hidden_state).abs().max() > 1e-3


@pytest.mark.parametrize(
    "name", ["past_key_value", "layer_past", "cache_position", "encoder_mask", "cu_seq_lens_q"]
)
def test_an_unknown_keyword_that_would_matter_is_refused_by_name(name):
    model = tiny_model()
    input_ids = random_ids(1, 4)
    with pytest.raises(ValueError, match=f"^{name} is not read"):
        model(input_ids, **{name: torch.tensor([0])})
    with pytest.raises(ValueError, match=r"^is_causal is not read"):
        model(input_ids, is_causal=False)
    model(input_ids, **{name: None}, is_causal=True, token_type_ids=torch.zeros_like(input_ids))


def test_two_caches_are_refused():
    caches = {name: DynamicCache() for name in CACHE_NAMES}
    with pytest.raises(ValueError, match="give one of them"):
        tiny_model()(random_ids(1, 4), **caches)
