"""Perplexity against a loop over windows, against Transformers' own loss, and its limits."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from stablemask.cli.evaluate import parse_lengths
from stablemask.errors import InputError
from stablemask.evaluation import perplexity, perplexity_of, perplexity_text

from ..models.tiny import random_ids, tiny_model


def naive(model, tokens, length, stride):
    """Each window by itself, in the words of the definition."""
    losses, end_before = [], 0
    starts = []
    start = 0
    while start + length < len(tokens):
        starts.append(start)
        start += stride
    starts.append(len(tokens) - length)
    for start in starts:
        window = tokens[start : start + length]
        with torch.no_grad():
            logits = model(input_ids=window[None]).logits[0]
        for i in range(1, length):
            if start + i >= end_before:
                losses.append(F.cross_entropy(logits[i - 1], window[i]).item())
        end_before = start + length
    return losses


@pytest.mark.parametrize(
    ("num_tokens", "length", "stride"),
    [(16, 16, 8), (17, 16, 8), (100, 16, 8), (103, 16, 5), (64, 16, 16), (70, 16, 16), (40, 16, 1),
     (9, 2, 1), (50, 48, 7)],
)  # fmt: skip
@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_equals_a_loop_over_windows(num_tokens, length, stride, batch_size):
    torch.manual_seed(0)
    model, tokens = tiny_model(), random_ids(num_tokens)
    result = perplexity(
        model, tokens, length=length, stride=stride, batch_size=batch_size, progress=False
    )
    losses = naive(model, tokens, length, stride)
    assert result.tokens == len(losses)
    assert result.nats_per_token == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nats_per_token))
    assert (result.length, result.stride) == (length, stride)


@pytest.mark.parametrize("length", [2, 7, 16])
def test_every_token_but_the_first_is_scored_once_at_any_length(length):
    tokens = random_ids(61)
    assert perplexity(tiny_model(), tokens, length=length, progress=False).tokens == 60


@pytest.mark.parametrize("attention", ["stablemask", "softmax"])
def test_disjoint_windows_give_the_training_loss_of_transformers(attention):
    torch.manual_seed(0)
    model, blocks = tiny_model(attention=attention), random_ids(6, 16)
    with torch.no_grad():
        loss = model(input_ids=blocks, labels=blocks).loss.item()
    result = perplexity(model, blocks.flatten(), length=16, stride=16, progress=False)
    assert result.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert result.tokens == 6 * 15


def test_a_model_of_transformers():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    model, blocks = GPT2LMHeadModel(config).eval(), random_ids(3, 32)
    with torch.no_grad():
        loss = model(input_ids=blocks, labels=blocks).loss.item()
    result = perplexity(model, blocks.flatten(), length=32, stride=32, progress=False)
    assert result.nats_per_token == pytest.approx(loss, rel=1e-5)
    with pytest.raises(InputError, match=r"33 tokens needs 33 positions.* has 32"):
        perplexity(model, blocks.flatten(), length=33, progress=False)


def test_a_model_of_text_and_pictures():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(0)
    sizes = dict.fromkeys(("hidden_size", "intermediate_size"), 32)
    sizes |= dict.fromkeys(("num_hidden_layers", "num_attention_heads"), 2)
    text = {**sizes, "vocab_size": 61, "head_dim": 16, "num_key_value_heads": 1}
    text["max_position_embeddings"] = 16
    pictures = {**sizes, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=pictures, mm_tokens_per_image=4)
    model, blocks = Gemma3ForConditionalGeneration(config).eval(), random_ids(3, 16)
    with torch.no_grad():
        losses = [model(input_ids=block[None], labels=block[None]).loss.item() for block in blocks]
    lengths = parse_lengths(["1x"], model)
    assert lengths == [16]
    result = perplexity(model, blocks.flatten(), length=16, stride=16, progress=False)
    assert result.nats_per_token == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_a_model_that_ignores_logits_to_keep(monkeypatch):
    torch.manual_seed(0)
    model, tokens = tiny_model(), random_ids(50)
    expected = perplexity(model, tokens, length=16, progress=False)
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, use_cache: forward(input_ids))
    assert perplexity(model, tokens, length=16, progress=False) == expected


@pytest.mark.parametrize("kind", [list, np.uint16, np.int32, torch.int32])
def test_kinds_of_tokens(kind):
    torch.manual_seed(0)
    model, tokens = tiny_model(), random_ids(40)
    expected = perplexity(model, tokens, length=16, progress=False)
    if kind is list:
        given = tokens.tolist()
    elif isinstance(kind, torch.dtype):
        given = tokens.to(kind)
    else:
        given = tokens.numpy().astype(kind)
        given.setflags(write=False)
    assert perplexity(model, given, length=16, progress=False) == expected


def test_max_tokens_and_bytes():
    torch.manual_seed(0)
    model, tokens = tiny_model(), random_ids(80)
    expected = perplexity(model, tokens[:50], length=16, progress=False)
    assert expected.bits_per_byte is None
    result = perplexity(
        model, tokens, length=16, max_tokens=50, bytes_per_token=4.0, progress=False
    )
    assert result.nats_per_token == expected.nats_per_token
    assert result.bits_per_byte == pytest.approx(result.nats_per_token / math.log(2) / 4)


def test_training_mode_and_gradients_are_left_alone():
    model, tokens = tiny_model(attention_dropout=0.5).train(), random_ids(40)
    first = perplexity(model, tokens, length=16, progress=False)
    assert perplexity(model, tokens, length=16, progress=False) == first
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"length": 1}, "length must be at least 2, got 1"),
        ({"length": 16, "stride": 0}, "stride must be from 1 to the length of 16, got 0"),
        ({"length": 16, "stride": 17}, "stride must be from 1 to the length of 16, got 17"),
        ({"length": 16, "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"length": 16, "max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"length": 41}, "the text has 40 tokens, less than a window of 41"),
        ({"length": 16, "max_tokens": 10}, "the text has 10 tokens"),
    ],
)
def test_bad_arguments(settings, words):
    with pytest.raises(InputError, match=words):
        perplexity(tiny_model(), random_ids(40), progress=False, **settings)


def test_bad_inputs():
    for wrong in (61, -1):
        words = f"token id {wrong} is outside the model's vocabulary of 61"
        with pytest.raises(InputError, match=words):
            perplexity(tiny_model(), torch.full((40,), wrong), length=16, progress=False)
    with pytest.raises(InputError, match=r"\(2, 20\)"):
        perplexity(tiny_model(), random_ids(2, 20), length=16, progress=False)
    learned = tiny_model(position_encoding="learned")
    with pytest.raises(InputError, match=r"33 tokens needs 33 positions.* has 32"):
        perplexity(learned, random_ids(40), length=33, progress=False)
    assert perplexity(learned, random_ids(40), length=32, progress=False).tokens == 39
    broken = tiny_model()
    broken.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="loss is nan"):
        perplexity(broken, random_ids(40), length=16, progress=False)


def test_a_loss_whose_exponential_is_no_float():
    assert perplexity_of(709.0) == math.exp(709.0) == 8.218407461554972e307
    assert perplexity_of(710.0) == perplexity_of(math.inf) == math.inf
    assert math.isnan(perplexity_of(math.nan))
    assert [perplexity_text(p) for p in (12.345, math.exp(709), math.inf)] == [
        "12.35",
        "8.22e+307",
        "inf",
    ]

    torch.manual_seed(0)
    model, tokens = tiny_model(), random_ids(40)
    model.lm_head.weight.data *= 1e6
    with torch.no_grad():
        loss = model(input_ids=tokens[None], labels=tokens[None]).loss.item()
    assert loss > 710
    result = perplexity(model, tokens, length=40, stride=40, progress=False)
    assert result.nats_per_token == pytest.approx(loss, rel=1e-5)
    assert result.perplexity == math.inf
