"""What training starts from: prose, conversations, a tiny saved model, a small pretraining run."""

import json
import random
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from stablemask.data import train_tokenizer
from stablemask.training.callbacks import StopOnSignal
from stablemask.training.pretrain import pretrain
from stablemask.training.pretrain_options import PretrainOptions

STEPS = 40  # of a pretraining run

WORDS = [
    "the", "a", "model", "row", "mask", "sink", "token", "reads", "writes", "keeps", "its", "own"
]  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|endoftext|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture(scope="session")
def prose(tmp_path_factory) -> Path:
    """Prose enough for a small run: sentences of a few words in a random order."""
    generator = random.Random(0)
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    path.write_text("\n".join(" ".join(generator.choices(WORDS, k=12)) + "." for _ in range(1500)))
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


@pytest.fixture(scope="session")
def options(prose) -> PretrainOptions:
    return PretrainOptions(
        steps=STEPS, out="", data=str(prose), vocab_size=300, context=32, batch_size=2,
        dtype="float32", save_every=4, eval_every=20, eval_tokens=64, log_every=5,
        keep_checkpoints=3,
    )  # fmt: skip


@pytest.fixture(scope="session")
def uninterrupted(options, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    pretrain(replace(options, out=str(folder)))
    return folder


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_weights(folder: Path, other: Path, file: str = "model.safetensors") -> None:
    ours, theirs = (load_file(path / file) for path in (folder, other))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def kill_when_there(file: Path, run: Any) -> None:
    """Kill a process as soon as it has written a file."""
    while not file.exists():
        assert run.is_alive(), "the run ended before it could be killed"
        time.sleep(0.0005)
    run.kill()
    run.join()
    assert run.exitcode == -signal.SIGKILL


def stop_at(step: int | None, patch: pytest.MonkeyPatch) -> None:
    """Let runs stop after a step, as by a signal; None lets them go on to their end."""

    def stop(self, args, state, control, **_):
        if state.global_step == step:
            self.received = signal.SIGTERM
            control.should_save = control.should_training_stop = True

    patch.setattr(StopOnSignal, "on_step_end", stop)
