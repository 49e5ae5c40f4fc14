"""How fast a Transformers model reads a prompt and generates, with StableMask and with stock SDPA."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from stablemask.errors import InputError
from stablemask.hf import apply_stablemask
from stablemask.inference.model import evaluating

from .timing import Samples, summarise

NEW_TOKENS = 64
PROMPTS = ((1, 32), (1, 1024), (8, 128))  # (batch, prompt length)
ROWS = ("sdpa", "stablemask")


ROUNDS = 9


def measure_generation(model: PreTrainedModel, *, quick: bool = False) -> list[dict[str, Any]]:
    """Greedy tokens per second and milliseconds for the prompt, by batch and length of the prompt.

    Weights, prompts and the number of tokens are the same in both rows, which take turns. The first token
    comes with the prompt; tokens per second are of those after it. ``of_sdpa`` and ``prompt_of_sdpa`` are
    median shares of SDPA's speed in the same rounds.

    Args:
        model: without StableMask in its configuration; it comes back as it was.

    Raises:
        InputError: the model has StableMask already.
    """
    config: Any = model.config.get_text_config(decoder=True)
    if model.config._attn_implementation != "sdpa" or getattr(config, "stablemask", None):
        raise InputError("give a model that runs stock SDPA; StableMask is put into it here")
    records = []
    for batch, length in PROMPTS[:1] if quick else PROMPTS:
        ids = torch.randint(config.vocab_size, (batch, length), device=model.device)
        prompts: dict[str, Samples] = {row: {} for row in ROWS}
        decodes: dict[str, Samples] = {row: {} for row in ROWS}
        with evaluating(model):
            for row in ROWS:
                _generate(model, config, ids, row)
            for number in range(2 if quick else ROUNDS):
                for row in ROWS if number % 2 else ROWS[::-1]:
                    seconds = _generate(model, config, ids, row)
                    prompts[row][number], decodes[row][number] = seconds
        for row in ROWS:
            prompt = summarise(prompts[row], prompts["sdpa"])
            decode = summarise(decodes[row], decodes["sdpa"])
            assert prompt.ratio
            assert decode.ratio
            records.append(
                {
                    "row": row,
                    "dtype": str(model.dtype).removeprefix("torch."),
                    "batch": batch,
                    "prompt": length,
                    "new_tokens": NEW_TOKENS,
                    "tokens_per_second": round(batch * (NEW_TOKENS - 1) / decode.ms * 1e3, 1),
                    "of_sdpa": round(1 / decode.ratio, 3),
                    "prompt_ms": round(prompt.ms, 1),
                    "prompt_of_sdpa": round(1 / prompt.ratio, 3),
                    "samples": decode.samples,
                }
            )
    return records


class _Clock(BaseStreamer):
    """When the prompt and each token went by."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _generate(model: PreTrainedModel, config: Any, ids: Tensor, row: str) -> tuple[float, float]:
    """Seconds to the first token, and from there to the last."""
    if row == "stablemask":
        apply_stablemask(model)
    generate: Callable[..., Tensor] = model.generate  # type: ignore[assignment]
    clock = _Clock(ids.device)
    try:
        generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            streamer=clock,
        )
    finally:
        config.stablemask = None
        model.set_attn_implementation("sdpa")
    begun, first, *_, last = clock.times
    return first - begun, last - first
