"""A bounded cache is a sliding-window mask in every layer, however the text is cut, and stays small."""

import itertools
from functools import partial

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import stablemask.hf.attention
from stablemask.data import train_tokenizer
from stablemask.errors import InputError
from stablemask.hf import apply_stablemask
from stablemask.inference import generate
from stablemask.inference.streaming import cached_logits, mass_held, window_cache
from stablemask.models import layers, modeling

from ..models.tiny import BY_DISTANCE, random_ids, tiny_model
from ..oracle import sink_definition

WINDOW = 8
LENGTH, MANY = 45, 20_000
CHUNKS = (1, 3, WINDOW, LENGTH)
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
}
TEXT = "the quick brown fox jumps over the lazy dog\n" * 20


def family(name, **overrides):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **overrides})
    return AutoModelForCausalLM.from_config(config).double().eval()


def band(length=LENGTH, window=WINDOW):
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return ((distance >= 0) & (distance < window))[None, None]


@torch.no_grad()
def by_chunks(model, ids, chunk, window=WINDOW):
    cache = window_cache(model, window)
    logits = torch.cat([cached_logits(model, piece, cache) for piece in ids.split(chunk, 1)], 1)
    assert {layer.keys.shape[2] for layer in cache.layers} <= set(range(window))
    return logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_llama_with_a_window_is_mistral(attention):
    """The same weights and code but for the sliding-window mask, which is Transformers' own."""
    llama = family("Llama")
    mistral = family("Mistral", sliding_window=WINDOW)
    mistral.load_state_dict(llama.state_dict())
    mistral.set_attn_implementation("eager")
    llama.set_attn_implementation(attention)
    ids = random_ids(2, LENGTH)
    with torch.no_grad():
        expected = mistral(ids).logits
        assert (llama(ids).logits - expected).abs().max() > 1
    for chunk in CHUNKS:
        # Llama's norms and softmax are in float32.
        torch.testing.assert_close(by_chunks(llama, ids, chunk), expected, rtol=0, atol=1e-4)


def test_a_layer_keeps_a_shorter_window_of_its_own():
    model = family("Gemma3Text", num_hidden_layers=6, head_dim=8, sliding_window=5)
    assert {"full_attention", "sliding_attention"} == set(model.config.layer_types)
    masks = {"full_attention": band(window=12), "sliding_attention": band(window=5)}
    ids = random_ids(2, LENGTH)
    with torch.no_grad():
        expected = model(ids, attention_mask=masks).logits
    for chunk in CHUNKS:
        torch.testing.assert_close(by_chunks(model, ids, chunk, 12), expected, rtol=0, atol=1e-4)


def dense(query, key, value, sink_logits, *, attn_mask=None, alibi_slopes=None, **_):
    """What a layer asks for, by the definition; ``attn_mask`` is the band, bool or additive."""
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask == 0
    bias = None
    if alibi_slopes is not None:
        n = query.shape[2]
        bias = -alibi_slopes[:, None, None] * (torch.arange(n)[:, None] - torch.arange(n))
    return sink_definition(query, key, value, sink_logits.double(), attn_mask, bias)


@pytest.mark.parametrize(
    ("position", "kind"),
    [
        *itertools.product(
            ("rope", "alibi", "nope", "sinusoidal"), ("stablemask", "softmax", "learned-sink")
        ),
        *itertools.product(("rope",), BY_DISTANCE),
    ],
)
def test_our_decoder_is_the_dense_definition_in_a_band(monkeypatch, position, kind):
    model = tiny_model(torch.float64, position_encoding=position, attention=kind)
    ids = random_ids(2, LENGTH)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(layers, "sink_attention", dense)
        expected = model(ids, attention_mask=band(), use_cache=False).logits
        assert (model(ids, use_cache=False).logits - expected).abs().max() > 0.1
    for chunk in CHUNKS:
        torch.testing.assert_close(by_chunks(model, ids, chunk), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_a_held_mass_is_that_of_the_last_position_that_sees_its_whole_past(monkeypatch, position):
    model = tiny_model(torch.float64, position_encoding=position, stablemask={"gamma": 0.2})
    ids = random_ids(2, LENGTH)
    mass = modeling.position_sink_logits

    def held(config, positions, *learned):
        return mass(config, positions.clamp(max=WINDOW - 1), *learned)

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(layers, "sink_attention", dense)
        patch.setattr(modeling, "position_sink_logits", held)
        expected = model(ids, attention_mask=band(), use_cache=False).logits
    for chunk in CHUNKS:
        with mass_held(model, WINDOW):
            actual = by_chunks(model, ids, chunk)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
        assert (by_chunks(model, ids, chunk) - expected).abs().max() > 0.1


def test_stablemask_in_llama_is_the_dense_definition_in_a_band(monkeypatch):
    model = apply_stablemask(family("Llama"), gamma=0.05)
    ids = random_ids(2, LENGTH)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(stablemask.hf.attention, "sink_attention", dense)
        positions = torch.arange(LENGTH)[None]
        # Additive: a band of bools looks like padding to the attention, which would warn.
        mask = band().double().log()
        expected = model(ids, attention_mask=mask, position_ids=positions).logits
    for chunk in CHUNKS:
        torch.testing.assert_close(by_chunks(model, ids, chunk), expected, rtol=0, atol=1e-4)


def test_any_number_of_tokens_in_constant_memory():
    """And right to the last: two layers see no further than twice the window."""
    model = tiny_model(hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    ids = random_ids(1, MANY)
    cache = window_cache(model, WINDOW)
    stored = set()
    pieces = (ids[:, :-500].split(50, 1), ids[:, -500:].split(1, 1))
    with torch.no_grad():
        for piece in itertools.chain(*pieces):
            logits = cached_logits(model, piece, cache)
            if piece.shape[1] == 1:
                stored.add(sum(
                    tensor.untyped_storage().nbytes()
                    for layer in cache.layers for tensor in (layer.keys, layer.values)
                ))  # fmt: skip
        seen = 2 * WINDOW
        expected = model(
            ids[:, -seen:],
            attention_mask=band(seen),
            position_ids=torch.arange(MANY - seen, MANY)[None],
            use_cache=False,
        ).logits[:, -1:]
    assert cache.get_seq_length() == MANY
    # Two layers, keys and values, one head of 8 numbers in float32.
    assert stored == {2 * 2 * WINDOW * 8 * 4}
    # RoPE turns by the position in float32, here 2e4 of it.
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-2)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 300)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    model = tiny_model(vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = None
    return model


SAMPLING = {"temperature": 1.5, "top_p": 0.9, "top_k": 50, "seed": 3}


@pytest.mark.parametrize("settings", [{}, SAMPLING, {"prefill_chunk_size": 2}])
def test_a_window_as_long_as_the_text_changes_nothing(model, tokenizer, settings):
    """Also what a checkpoint asks for besides."""
    model.generation_config.repetition_penalty = 1.3
    prompts = ["the quick brown fox"]
    assert generate(
        model, tokenizer, prompts, max_new_tokens=30, window=100, **settings
    ) == generate(model, tokenizer, prompts, max_new_tokens=30, **settings)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"min_new_tokens": 5}, "w1 w1 w1 w1 w1 w0"),
        ({"min_length": 8}, "w1 w1 w1 w1 w0"),
        ({"begin_suppress_tokens": [0]}, "w1 w0"),
        ({"forced_eos_token_id": 2, "eos_token_id": None}, "w0 w0 w0 w0 w0 w0 w2"),
    ],
)
def test_what_a_checkpoint_counts_is_counted_from_the_beginning(asked, words):
    """All logits are alike, so that the first id wins unless it is suppressed: it is the end token."""
    vocabulary = {f"w{number}": number for number in range(61)}
    words_alone = Tokenizer(WordLevel(vocabulary, unk_token="w60"))
    words_alone.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words_alone)
    model = tiny_model(num_hidden_layers=1)
    model.lm_head.weight.data.zero_()
    model.generation_config.update(**{"eos_token_id": 0, **asked})
    for window in (None, 3, 4, 6, 20):
        (text,) = generate(model, tokenizer, ["w7 w8 w9 w10"], max_new_tokens=7, window=window)
        assert text.split() == words.split(), window


def greedy_in_a_band(model, tokenizer, prompt, count):
    ids, new = tokenizer(prompt)["input_ids"], []
    for _ in range(count):
        text = torch.tensor([ids + new])
        with torch.no_grad(), mass_held(model, WINDOW):
            logits = model(text, attention_mask=band(text.shape[1]), use_cache=False).logits
        token = int(logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
    return tokenizer.decode(ids + new)[len(tokenizer.decode(ids)) :]


def test_prompts_past_the_window_and_the_training_length(model, tokenizer):
    prompts = [TEXT[:120], "the", TEXT[30:90]]
    assert len(tokenizer(prompts[0])["input_ids"]) > 2 * WINDOW
    expected = [greedy_in_a_band(model, tokenizer, prompt, 40) for prompt in prompts]
    pieces = []
    for settings in [{}, {"prefill_chunk_size": 3}, {"prefill_chunk_size": 99}]:
        texts = generate(
            model, tokenizer, prompts, max_new_tokens=40, window=WINDOW,
            stream=pieces.append, **settings,
        )  # fmt: skip
        assert texts == expected
    assert "".join(pieces) == 3 * "".join(expected)
    assert expected[0] != generate(model, tokenizer, prompts[:1], max_new_tokens=40)[0]


def test_no_limit_but_the_end_token(model, tokenizer):
    ids = []
    watch = model.register_forward_pre_hook(
        lambda _, args, kwargs: ids.extend(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    settings = {"window": WINDOW, "temperature": 1.5, "seed": 3}
    model.generation_config.eos_token_id = len(tokenizer)  # which no model can make
    generate(model, tokenizer, ["the"], max_new_tokens=200, **settings)
    watch.remove()
    end = model.generation_config.eos_token_id = ids[100]
    start = len(tokenizer("the")["input_ids"])
    until = ids.index(end, start) + 1
    pieces = []
    texts = generate(
        model, tokenizer, ["the"], max_new_tokens=None, stream=pieces.append, **settings
    )
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    assert texts == [decode(ids[:until])[len(decode(ids[:start])) :]]
    assert "".join(pieces) == texts[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"window": 1}, "window must be at least 2, got 1"),
        ({"max_new_tokens": None}, "max_new_tokens may be none with a window only"),
    ],
)
def test_bad_settings(model, tokenizer, settings, words):
    with pytest.raises(InputError, match=words):
        generate(model, tokenizer, ["the"], **settings)


@pytest.mark.parametrize("count", [None, 40])
def test_a_learned_table_ends(tokenizer, count):
    model = tiny_model(vocab_size=len(tokenizer), position_encoding="learned")
    with pytest.raises(InputError, match="learned position table has 32"):
        generate(model, tokenizer, ["the"], max_new_tokens=count, window=8)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_change_with_the_length(kind):
    """Keys that were cached would be turned by others than those that come."""
    model = family("Llama")
    model.config.rope_parameters = {
        "rope_type": kind, "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16,
    }  # fmt: skip
    with pytest.raises(InputError, match=f"RoPE of one kind for all lengths, .* is {kind}"):
        window_cache(model, WINDOW)


@pytest.mark.parametrize("name", ["Mamba", "Bloom", "LlamaFlash"])
def test_models_that_cannot_have_a_window(name):
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1}
    if name == "LlamaFlash":
        model = family("Llama")
        model.config._attn_implementation_internal = "flash_attention_2"
        words = "attn_implementation='sdpa'"
    else:
        config = getattr(transformers, f"{name}Config")(**sizes)
        model = AutoModelForCausalLM.from_config(config)
        words = f"cannot be set for model_type '{name.lower()}'"
    with pytest.raises(InputError, match=words):
        window_cache(model, 8)
