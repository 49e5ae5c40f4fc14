"""What finetuning starts from: prose, conversations, and a tiny saved model with its tokenizer."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stablemask.data import train_tokenizer

WORDS = [
    "the",
    "a",
    "model",
    "row",
    "mask",
    "sink",
    "token",
    "reads",
    "writes",
    "keeps",
    "its",
    "own",
]
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|endoftext|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def make_prose(seed: int, lines: int) -> str:
    generator = random.Random(seed)
    return "\n".join(" ".join(generator.choices(WORDS, k=12)) + "." for _ in range(lines))


@pytest.fixture(scope="session")
def prose(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text(make_prose(0, 400))
    return path


@pytest.fixture(scope="session")
def base(prose, tmp_path_factory) -> Path:
    """A Llama with weights large enough that attention matters, and a tokenizer for chat."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer([prose.read_text()], 280)
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        initializer_range=0.2, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chats(tmp_path_factory) -> Path:
    """Sixty conversations of several lengths, in which the assistant says a word twice."""
    generator = random.Random(1)
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    with path.open("w") as lines:
        for _ in range(60):
            messages = []
            for _ in range(generator.randint(1, 2)):
                word = generator.choice(WORDS)
                question = " ".join(generator.choices(WORDS, k=generator.randint(1, 4)))
                messages.append({"role": "user", "content": f"{question} {word}"})
                messages.append({"role": "assistant", "content": f"{word} {word}"})
            print(json.dumps({"messages": messages}), file=lines)
    return path


@pytest.fixture
def corpora(tmp_path_factory, monkeypatch):
    """The user's cache of corpora stays out of it."""
    monkeypatch.setenv("STABLEMASK_CACHE", str(tmp_path_factory.getbasetemp() / "corpora"))
