"""A token's mass follows its place in its own text, however the text reaches the model.

What every way of running is held against is one whole text in one forward pass, which
test_families.py holds against the definition.
"""

import warnings

import pytest
import torch
from transformers import ContinuousBatchingConfig, DynamicCache, StaticCache

from stablemask.hf import apply_stablemask
from stablemask.models.cache import CACHE
from tests import marks

from .families import MIXED, WINDOW, Family

EPS = torch.finfo(torch.float32).eps
LENGTH = 17  # the window is 5
# The norms of all but GPT-NeoX are float32.
MODELS = [
    Family("Llama", "LlamaForCausalLM"),
    Family("Mistral", "MistralForCausalLM", WINDOW),
    Family("Gemma 3", "Gemma3ForCausalLM", MIXED | {"head_dim": 8}),
    Family("GPT-NeoX", "GPTNeoXForCausalLM", {"num_key_value_heads": 4}),
]
NEW = 8


@pytest.fixture(params=MODELS, ids=lambda family: family.name)
def model(request):
    return build(request.param)


def build(family, gamma=(0.3, 0.1, 0.05, 0.2), **settings):
    shift = [[0.5, -1.0, 2.0, 0.0], [1.5, -0.5, 0.25, -3.0]]
    config = family.config(stablemask={"gamma": list(gamma), "shift": shift, **settings})
    model = family.model_class(config).double().eval()
    model.generation_config.eos_token_id = None  # every text gets as many tokens
    return model


def texts(*lengths):
    return [torch.randint(3, 61, (1, length)) for length in lengths]


def padded(texts, side):
    """A batch, its mask, and where its tokens stand in their own texts."""
    width = max(text.shape[1] for text in texts)
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        place = slice(width - text.shape[1], None) if side == "left" else slice(text.shape[1])
        ids[row, place], mask[row, place] = text[0], 1
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def whole(model, ids):
    return model(ids, use_cache=False).logits


def assert_same(ours, truth):
    assert (ours - truth).abs().max() < 64 * EPS * truth.abs().max()


def greedy(model, ids, **settings):
    given = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **settings}
    return model.generate(ids, **given)


def without_cache(model, ids, new=NEW):
    for _ in range(new):
        ids = torch.cat([ids, whole(model, ids)[:, -1:].argmax(-1)], -1)
    return ids


def test_the_truth_depends_on_positions(model):
    """Or else nothing below would test anything."""
    (ids,) = texts(LENGTH)
    later = torch.arange(20, 20 + LENGTH)[None]
    mask = torch.ones_like(ids)  # with it, position_ids are no sign of packing
    shifted = model(ids, position_ids=later, attention_mask=mask, use_cache=False).logits
    assert (shifted - whole(model, ids)).abs().max() > 0.01 * shifted.abs().max()


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    "chunks", [[1] * LENGTH, [7] + [1] * 10, [4] * 4 + [1], [8, 8, 1], [9, 4, 4], [LENGTH]]
)
def test_chunks_behind_a_cache_equal_one_pass(model, chunks, static):
    (ids,) = texts(LENGTH)
    config = model.config
    cache = StaticCache(config, max_cache_len=24) if static else DynamicCache(config=config)
    logits = [model(part, **{CACHE: cache}).logits for part in ids.split(chunks, -1)]
    assert_same(torch.cat(logits, 1), whole(model, ids))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_texts_alone(model, side):
    alone = texts(LENGTH, 9, 3)
    ids, mask, positions = padded(alone, side)
    given = {"position_ids": positions} if side == "left" else {}
    logits = model(ids, attention_mask=mask, **given).logits
    for row, text in enumerate(alone):
        assert_same(logits[row][mask[row].bool()], whole(model, text)[0])


def test_packed_texts_equal_separate_ones(model):
    alone = texts(LENGTH, 3, 9)
    ids = torch.cat(alone, -1)
    positions = torch.cat([torch.arange(text.shape[1]) for text in alone])[None]
    truth = torch.cat([whole(model, text) for text in alone], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = model(ids, position_ids=positions, use_cache=False).logits
        assert_same(logits, truth)
        apart = torch.block_diag(*(torch.ones(2 * [text.shape[1]]).tril() for text in alone))
        mask = apart.bool()[None, None]
        if "sliding_attention" not in (getattr(model.config, "layer_types", None) or ()):
            model(ids, position_ids=positions, use_cache=False, attention_mask=mask)


def test_packed_texts_that_are_merged_warn(model):
    """As stock Transformers merges them, without a word, where it gets a mask of padding or a cache."""
    alone = texts(3, 9)
    ids = torch.cat(alone, -1)
    positions = torch.cat([torch.arange(text.shape[1]) for text in alone])[None]
    truth = torch.cat([whole(model, text) for text in alone], 1)
    ones = torch.ones_like(ids)
    padding = torch.nn.functional.pad(ones, (0, 2))
    for given in (
        {"attention_mask": ones, "use_cache": False},
        {"use_cache": True},
        {"attention_mask": padding, "use_cache": False},
    ):
        pad = given.get("attention_mask", ones).shape[1] - ids.shape[1]
        rows = [torch.nn.functional.pad(tensor, (0, pad)) for tensor in (ids, positions)]
        with pytest.warns(UserWarning, match="each document sees those before it"):
            logits = model(rows[0], position_ids=rows[1], **given).logits
        assert (logits[:, : ids.shape[1]] - truth).abs().max() > 1e-3


@pytest.mark.parametrize(
    "way",
    [
        {},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prefill_chunk_size": 4},
        {"prefill_chunk_size": 9},
    ],
    ids=str,
)
def test_generate_equals_texts_alone_without_a_cache(model, way):
    alone = texts(LENGTH, 9, 3)
    ids, mask, _ = padded(alone, "left")
    tokens = greedy(model, ids, attention_mask=mask, **way)
    for row, text in enumerate(alone):
        assert tokens[row, -NEW:].equal(without_cache(model, text)[0, -NEW:])


def test_prompt_lookup_and_an_assistant_equal_greedy_search(model):
    ids = torch.randint(3, 61, (1, 4)).repeat(1, 3)
    truth = without_cache(model, ids, 2 * NEW)
    settings = {"max_new_tokens": 2 * NEW}
    assert greedy(model, ids, prompt_lookup_num_tokens=3, **settings).equal(truth)
    family = next(f for f in MODELS if isinstance(model, f.model_class))
    for assistant in (build(family), model):
        tokens = greedy(model, ids, assistant_model=assistant, **settings)
        assert tokens.equal(truth)


def test_beam_search_equals_itself_without_a_cache(model):
    alone = texts(9, 6)
    ids, mask, _ = padded(alone, "left")
    settings = {"num_beams": 3, "length_penalty": 0.0, "attention_mask": mask}
    tokens = greedy(model, ids, **settings)
    assert tokens.equal(greedy(model, ids, use_cache=False, **settings))
    for row, text in enumerate(alone):
        single = greedy(model, text, num_beams=3, length_penalty=0.0)
        assert tokens[row, -NEW:].equal(single[0, -NEW:])


def test_masks_of_four_dimensions(model):
    """As whoever builds their own masks hands them over."""
    (ids,) = texts(5)  # no longer than the window
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    added = torch.zeros(1, 1, 5, 5).double().masked_fill(~causal, torch.finfo(torch.float64).min)
    mixed = "sliding_attention" in (getattr(model.config, "layer_types", None) or ())
    for mask in (causal, added, added.masked_fill(~causal, -torch.inf)):
        both = {"full_attention": mask, "sliding_attention": mask} if mixed else mask
        logits = model(ids, attention_mask=both, position_ids=torch.arange(5)[None]).logits
        assert_same(logits, whole(model, ids))


def test_a_left_padded_batch_without_position_ids_warns(model):
    alone = texts(LENGTH, 9)
    ids, mask, positions = padded(alone, "left")
    with pytest.warns(UserWarning, match="position_ids count padding"):
        model(ids, attention_mask=mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, attention_mask=mask, position_ids=positions)
        right, mask, _ = padded(alone, "right")
        model(right, attention_mask=mask)
        greedy(model, ids, attention_mask=padded(alone, "left")[1])


@pytest.mark.parametrize(
    "model",
    [*MODELS[:-1], pytest.param(MODELS[-1], marks=marks.neox_continuous_batching)],
    ids=lambda family: family.name,
    indirect=True,
)
def test_continuous_batching(model):
    """Transformers' scheduler for a server: it takes no attention but its own names."""
    alone = texts(LENGTH, 9, 3)
    prompts = [text[0].tolist() for text in alone]
    settings = model.generation_config
    settings.max_new_tokens, settings.do_sample = NEW, False
    if not hasattr(ContinuousBatchingConfig(), "page_size"):
        pytest.skip("needs a Transformers whose continuous batching can be told a page_size")
    # As little as holds these texts; by default it takes most of the memory.
    limits = ContinuousBatchingConfig(page_size=16, num_blocks=8, max_batch_tokens=32)
    ask = {"generation_config": settings, "continuous_batching_config": limits}
    with pytest.raises(ValueError, match="stablemask is not supported for continuous batching"):
        model.generate_batch(prompts, **ask)
    model.set_attn_implementation("sdpa")
    done = model.generate_batch(prompts, **ask)
    tokens = [result.generated_tokens for result in done.values()]
    assert tokens == [without_cache(model, text)[0, -NEW:].tolist() for text in alone]


def test_under_the_name_of_sdpa_everything_is_the_same(model):
    """A model that was loaded before it was given StableMask runs Transformers' mask function."""
    alone = texts(LENGTH, 9)
    ids, mask, positions = padded(alone, "left")
    truth = [whole(model, text) for text in alone]
    model.set_attn_implementation("sdpa")
    logits = model(ids, attention_mask=mask, position_ids=positions).logits
    for row in range(2):
        assert_same(logits[row][mask[row].bool()], truth[row][0])
    for cache in (DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=24)):
        parts = [model(part, **{CACHE: cache}).logits for part in alone[0].split([9, 7, 1], -1)]
        assert_same(torch.cat(parts, 1), truth[0])


def test_start_and_a_finite_horizon_behind_a_cache(model):
    apply_stablemask(model, gamma=0.05, horizon=12, start=2, shift=-0.5)
    (ids,) = texts(LENGTH)
    cache = DynamicCache(config=model.config)
    logits = [model(part, **{CACHE: cache}).logits for part in ids.split([4, 7, 6], -1)]
    assert_same(torch.cat(logits, 1), whole(model, ids))
