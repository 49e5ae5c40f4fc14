"""Small random models, of Transformers and our own, and what they generate under Transformers."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from stablemask.hf import apply_stablemask, load_model
from stablemask.models import StableMaskConfig, StableMaskForCausalLM

VOCABULARY, CONTEXT, HEADS, LAYERS, NEW = 512, 512, 8, 3, 24
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 0,  # that of tokenizers that are trained here
    "pad_token_id": 0,
    "initializer_range": 0.08,
}
RATE = 1 / 64
CLOSE = 1e-4  # float32 sums in another order, through three layers
SHIFTS = [[0.1 * head - layer for head in range(HEADS)] for layer in range(LAYERS)]
WINDOWS = ["sliding_attention", "full_attention", "sliding_attention"]


def others(config_class, mass=None, **more):
    """A model of Transformers, with a mass where settings are given."""
    model = AutoModelForCausalLM.from_config(config_class(**SIZES, **more))
    return model if mass is None else apply_stablemask(model, **mass)


def with_floor():
    model = others(LlamaConfig, {"gamma": 0.02})
    model.config.stablemask = {**model.config.stablemask, "floor": 3.0}
    return model


def ours(**more):
    model = StableMaskForCausalLM(StableMaskConfig(**SIZES, **more))
    rates = model.model.log_gamma
    if rates is not None:
        with torch.no_grad():
            rates.copy_(torch.linspace(-6, -1, rates.numel()).view_as(rates))
    return model


MODELS = {
    "one rate": lambda: others(LlamaConfig, {"gamma": RATE, "hold": 100}),
    "rates by head": lambda: others(LlamaConfig, {"gamma": "slopes", "start": 1, "shift": 1.0}),
    "shifts by layer": lambda: others(LlamaConfig, {"gamma": RATE, "shift": SHIFTS, "start": 1}),
    "horizon": lambda: others(LlamaConfig, {"gamma": 0.01, "horizon": 150}),
    "floor": with_floor,
    "no mass": lambda: others(LlamaConfig),
    "Qwen3": lambda: others(Qwen3Config, {"gamma": RATE, "shift": SHIFTS}),
    "Mistral": lambda: others(MistralConfig, {"gamma": RATE}, sliding_window=48),
    "Gemma": lambda: others(
        Gemma3TextConfig, {"gamma": RATE}, sliding_window=48, layer_types=WINDOWS
    ),
    "rope": lambda: ours(stablemask={"gamma": [0.5, 0.25, 0.1, 0.05, 0.02, 0.01, 0.005, 0.001]}),
    "tied": lambda: ours(stablemask={"gamma": RATE}, tie_word_embeddings=True),
    "some layers": lambda: ours(stablemask={"gamma": RATE, "layers": [0, 2]}),
    "learned rates": lambda: ours(stablemask={"gamma": "learned"}),
    "alibi": lambda: ours(position_encoding="alibi"),
    "nope": lambda: ours(position_encoding="nope"),
    "learned positions": lambda: ours(position_encoding="learned"),
    "sinusoidal": lambda: ours(position_encoding="sinusoidal"),
    "softmax": lambda: ours(attention="softmax"),
    "softmax1": lambda: ours(attention="softmax1"),
    "learned sink": lambda: ours(attention="learned-sink"),
}


def prompts():
    """Of all lengths, and some that begin alike."""
    torch.manual_seed(1)

    def tokens(count):
        return torch.randint(2, VOCABULARY, (count,)).tolist()

    shared = tokens(130)
    alone = [tokens(n) for n in (1, 2, 5, 17, 31, 32, 33, 64, 65, 100, 200, 331, 7)]
    return alone + [shared + tokens(n) for n in (3, 40, 75)]


class Answer(NamedTuple):
    tokens: list[int]
    logprobs: list[float]


def save(model, folder: Path) -> Path:
    with torch.no_grad():  # so that the likeliest token is far from the next
        if not model.config.tie_word_embeddings:
            model.get_output_embeddings().weight.mul_(3)
    model.save_pretrained(folder)
    return folder


def answers(model, prompts, new=NEW):
    """What Transformers generates, greedily, each prompt alone."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
        tokens = out.sequences[0, len(prompt) :].tolist()
        logprobs = [torch.log_softmax(logits[0].float(), -1) for logits in out.logits]
        found.append(Answer(tokens, [row[t].item() for row, t in zip(logprobs, tokens)]))
    return found


def reference(folder: Path, prompts, new=NEW):
    return answers(load_model(str(folder), dtype=torch.float32), prompts, new)


def assert_same(answers, wanted):
    for prompt, (answer, right) in enumerate(zip(answers, wanted, strict=True)):
        assert answer.tokens == right.tokens, f"prompt {prompt}"
        assert answer.logprobs == pytest.approx(right.logprobs, abs=CLOSE), f"prompt {prompt}"
