"""Generation: against a plain loop, in batches, sampled, streamed, and refused."""

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from stablemask.data import train_tokenizer
from stablemask.errors import InputError
from stablemask.inference import generate
from stablemask.inference.generate import CallbackStreamer
from stablemask.inference.model import choose_device, position_table_length

from ..models.tiny import FEW_DESIGNS, tiny_model

TEXT = "the quick brown fox jumps over the lazy dog\n" * 20 + "ünïcödé 漢字 spaces  and\ttabs\n"
PROMPTS = ["the quick brown", "fox", "jumps over the lazy dog\n漢"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 300)


def model_for(tokenizer, **overrides):
    torch.manual_seed(0)
    model = tiny_model(vocab_size=len(tokenizer), **{"max_position_embeddings": 64, **overrides})
    model.generation_config.eos_token_id = None
    return model


def greedy(model, tokenizer, prompt, count):
    """No cache, no batch: the likeliest next token again and again."""
    ids = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
    new = []
    while len(new) < count:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        new.append(token)
    return tokenizer.decode(ids + new)[len(tokenizer.decode(ids)) :]


@pytest.mark.parametrize(("position", "kind"), FEW_DESIGNS)
def test_a_batch_equals_a_plain_loop_on_each_prompt(tokenizer, position, kind):
    model = model_for(tokenizer, position_encoding=position, attention=kind)
    texts = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    assert texts == [greedy(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    for size in (1, 3, 50):
        in_chunks = generate(model, tokenizer, PROMPTS, max_new_tokens=12, prefill_chunk_size=size)
        assert in_chunks == texts


def test_an_empty_prompt_begins_a_document(tokenizer):
    model = model_for(tokenizer)
    expected = greedy(model, tokenizer, "", 12)
    assert generate(model, tokenizer, [""], max_new_tokens=12) == [expected]


def test_chunks_of_a_long_prompt_see_no_mask(tokenizer, monkeypatch):
    """One prompt, nothing padded: each chunk is the past and itself, at the stock kernel's speed."""
    from stablemask.models import layers

    lengths = []
    attend = layers.sink_attention

    def watch(query, key, value, sink_logits, *, attn_mask=None, **rest):
        assert attn_mask is None
        lengths.append((query.shape[2], key.shape[2]))
        return attend(query, key, value, sink_logits, **rest)

    monkeypatch.setattr(layers, "sink_attention", watch)
    model = model_for(tokenizer, max_position_embeddings=512)
    prompt = TEXT[:200]
    tokens = len(tokenizer(prompt)["input_ids"])
    generate(model, tokenizer, [prompt], max_new_tokens=1, prefill_chunk_size=16)
    seen = lengths[:: model.config.num_hidden_layers]
    assert seen == [(min(16, tokens - i), min(i + 16, tokens)) for i in range(0, tokens, 16)]


def test_no_prompts(tokenizer):
    assert generate(model_for(tokenizer), tokenizer, []) == []


def test_the_end_token_ends_a_text_and_is_not_shown(tokenizer):
    model = model_for(tokenizer)
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    third = model.generate(ids, max_new_tokens=3, do_sample=False)[0, -1].item()
    expected = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=2)
    model.generation_config.eos_token_id = third
    assert len(model.generate(ids, max_new_tokens=9, do_sample=False)[0]) <= ids.shape[1] + 3
    text = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=9)[0]
    assert text.startswith(expected[0])
    assert len(tokenizer(text)["input_ids"]) < 9


def test_what_fills_up_a_batch_behind_an_end_is_not_shown():
    """Nor where a tokenizer has no padding token, and a word as its first."""
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(61)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2")
    model, prompts = model_for(tokenizer), ["w5 w6", "w7 w8 w9"]
    ids = torch.tensor([tokenizer(prompts[0])["input_ids"]])
    third = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=2)[0, -1].item()
    model.generation_config.eos_token_id = third
    alone = [generate(model, tokenizer, [prompt], max_new_tokens=9)[0] for prompt in prompts]
    assert len(alone[0].split()) <= 3 < len(alone[1].split())
    assert generate(model, tokenizer, prompts, max_new_tokens=9) == alone


@pytest.mark.parametrize("way", [{}, {"stream": lambda piece: None}, {"window": 40}])
def test_a_checkpoint_that_asks_for_beams_or_texts_to_stop_at(tokenizer, way):
    model = model_for(tokenizer)
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    asked = {"num_beams": 3, "num_return_sequences": 2, "return_dict_in_generate": True}
    model.generation_config.update(**asked)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12, **way) == expected
    model.generation_config.stop_strings = [expected[0][1:3]]
    text = generate(model, tokenizer, PROMPTS[:1], max_new_tokens=12, **way)[0]
    assert expected[0].startswith(text)
    assert len(text) < len(expected[0])


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5, "top_p": 0.9, "seed": 3}])
def test_streamed_pieces_make_up_the_text(tokenizer, settings):
    model = model_for(tokenizer)
    pieces = []
    texts = generate(model, tokenizer, PROMPTS, max_new_tokens=20, stream=pieces.append, **settings)
    assert "".join(pieces) == "".join(texts)
    assert len(pieces) > len(texts)
    if not settings:
        assert texts == generate(model, tokenizer, PROMPTS, max_new_tokens=20)


def test_a_stream_comes_while_the_text_is_made(tokenizer):
    model, events = model_for(tokenizer), []
    model.register_forward_hook(lambda *_: events.append("step"))
    generate(model, tokenizer, PROMPTS[:1], max_new_tokens=30, stream=events.append)
    assert any(event != "step" for event in events[: events.index("step") + 25])


MANY = "漢字🙂🙂 ไทย é" * 4  # no letter of it in the vocabulary, so that bytes stand in a row


@pytest.fixture(scope="module")
def of_bytes():
    """As Llama's tokenizer is: what it has no token for it spells by bytes."""
    names = [*(f"<0x{byte:02X}>" for byte in range(256)), "</s>"]
    bpe = BPE({name: number for number, name in enumerate(names)}, [], byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.mark.parametrize("characters", [1, 5, 24])
def test_a_stream_of_bytes_is_one_of_characters(of_bytes, characters):
    prompt, answer = MANY[:characters], MANY[characters:]
    pieces = []
    streamer = CallbackStreamer(of_bytes, pieces.append)
    streamer.put(torch.tensor([*prompt.encode()]))
    for byte in answer.encode():
        streamer.put(torch.tensor([byte]))
    streamer.end()
    assert pieces == list(answer)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_text_that_ends_within_a_character_is_whole_up_to_there(of_bytes, monkeypatch, missing):
    new = [*MANY.encode()][: len(MANY.encode()) - 3 - missing]  # of the last of ไทย
    model = tiny_model(vocab_size=len(of_bytes))
    monkeypatch.setattr(
        model, "generate", lambda input_ids, **_: torch.cat((input_ids, torch.tensor([new])), 1)
    )
    (text,) = generate(model, of_bytes, [MANY])
    assert text.rstrip("\ufffd") == MANY[: MANY.rindex("ไทย") + 3 - (missing > 0)]
    assert text.count("\ufffd") == {0: 0, 1: 2, 2: 1}[missing]


def test_a_seed_repeats_a_sample_and_touches_nothing_else(tokenizer):
    model = model_for(tokenizer)

    def sample(seed, **settings):
        return generate(
            model, tokenizer, PROMPTS, max_new_tokens=12, temperature=1.0, seed=seed, **settings
        )

    state = torch.get_rng_state()
    assert sample(1) == sample(1)
    assert sample(1) != sample(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert sample(None) != sample(None)


def test_narrow_sampling_is_greedy(tokenizer):
    model = model_for(tokenizer)
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    for settings in [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}, {"temperature": 1e-45}]:
        settings = {"temperature": 2.0, **settings}
        assert generate(model, tokenizer, PROMPTS, max_new_tokens=12, **settings) == expected


def test_sampling_without_top_k_reaches_every_token(tokenizer):
    """Transformers' own default keeps the 50 likeliest."""
    model = model_for(tokenizer)
    model.lm_head.weight.data.zero_()  # all tokens alike
    ids = torch.tensor([[1, 2]])
    kept = model.generate(ids, max_new_tokens=50, do_sample=True)[0]
    assert len(set(kept.tolist())) <= 52
    seen = set()
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs["input_ids"].flatten().tolist()),
        with_kwargs=True,
    )
    generate(model, tokenizer, ["a"] * 20, max_new_tokens=50, temperature=1.0, seed=0)
    assert len(seen) > 150


def test_the_defaults_of_a_checkpoint_do_not_make_greedy_random(tokenizer):
    model = model_for(tokenizer)
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    model.generation_config.update(do_sample=True, temperature=2.0, top_k=20, top_p=0.9)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12) == expected


def test_dropout_is_off_and_the_mode_comes_back(tokenizer):
    model = model_for(tokenizer, attention_dropout=0.5)
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    model.train()
    frozen = model.lm_head.eval()
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12) == expected
    assert [module for module in model.modules() if not module.training] == [frozen]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p must be greater than 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p must be greater than 0 and at most 1, got 1.5"),
        ({"temperature": 1.0, "top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.5}, "need a temperature above 0"),
        ({"top_k": 5}, "need a temperature above 0"),
    ],
)
def test_bad_arguments(tokenizer, settings, words):
    with pytest.raises(InputError, match=words):
        generate(model_for(tokenizer), tokenizer, PROMPTS, **settings)


def test_longer_than_a_learned_table_is_refused_before_any_work(tokenizer):
    model = model_for(tokenizer, position_encoding="learned", max_position_embeddings=16)
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    long = "the quick brown fox " * 10
    count = len(tokenizer(long)["input_ids"])
    with pytest.raises(InputError) as error:
        generate(model, tokenizer, ["fox", long], max_new_tokens=4)
    assert f"prompt 2 of {count} tokens with 4 new ones needs {count + 3}" in str(error.value)
    assert "has 16" in str(error.value)


def test_a_learned_table_can_be_filled_to_its_last_row(tokenizer):
    model = model_for(tokenizer, position_encoding="learned", max_position_embeddings=16)
    count = len(tokenizer("fox")["input_ids"])
    generate(model, tokenizer, ["fox"], max_new_tokens=17 - count)
    with pytest.raises(InputError, match="needs 17 positions"):
        generate(model, tokenizer, ["fox"], max_new_tokens=18 - count)


def test_a_tokenizer_of_another_model(tokenizer):
    with pytest.raises(InputError, match="outside the model's vocabulary of 61"):
        generate(tiny_model(), tokenizer, PROMPTS)


@pytest.mark.parametrize(
    ("name", "length"), [("GPT2", 32), ("OPT", 32), ("GPTNeo", 32), ("Llama", None)]
)
def test_position_tables_of_other_models(name, length):
    import transformers

    sizes = {"vocab_size": 61, "hidden_size": 32, "max_position_embeddings": 32}
    if name == "GPT2":
        sizes = {"vocab_size": 61, "n_embd": 32, "n_positions": 32, "n_layer": 1, "n_head": 2}
    elif name == "GPTNeo":
        sizes |= {"num_layers": 1, "attention_types": [[["global"], 1]], "num_heads": 2}
    elif name == "OPT":
        sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32,
                  "word_embed_proj_dim": 32}  # fmt: skip
    else:
        sizes |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert position_table_length(model) == length


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device(None).type in ("cpu", "cuda")
    for name in ("abacus", "meta"):
        with pytest.raises(InputError, match=f"device '{name}' cannot be used here"):
            choose_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="device 'cuda' cannot be used here"):
            choose_device("cuda")
