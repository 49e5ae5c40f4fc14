"""Tokens per second of a Transformers model that generates, with StableMask and with stock SDPA."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import InputError
from ..hf import apply_stablemask
from ..inference.model import evaluating
from .timing import Budget, interleave, summarise

NEW_TOKENS = 64
PROMPTS = ((1, 32), (1, 1024), (8, 128))  # (batch, prompt length)
ROWS = ("sdpa", "stablemask")


def measure_generation(model: PreTrainedModel, *, quick: bool = False) -> list[dict[str, Any]]:
    """Greedy tokens per second by batch and prompt, and the median share of SDPA's in the same rounds.

    Weights, prompts and the number of tokens are the same in both rows; reading the prompt counts.

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
        functions = {row: partial(_generate, model, config, ids, row) for row in ROWS}
        with evaluating(model):
            for function in functions.values():
                function()
            samples = interleave(functions, Budget(30.0, 5), model.device.type, always=ROWS)
        for row in ROWS:
            summary = summarise(samples[row], samples["sdpa"])
            records.append(
                {
                    "row": row,
                    "dtype": str(model.dtype).removeprefix("torch."),
                    "batch": batch,
                    "prompt": length,
                    "new_tokens": NEW_TOKENS,
                    "tokens_per_second": round(batch * NEW_TOKENS / summary.ms * 1e3, 1),
                    "of_sdpa": round(1 / summary.ratio, 3) if summary.ratio else None,
                    "samples": summary.samples,
                }
            )
    return records


def _generate(model: PreTrainedModel, config: Any, ids: Tensor, row: str) -> None:
    if row == "stablemask":
        apply_stablemask(model)
    generate: Callable[..., Tensor] = model.generate  # type: ignore[assignment]
    try:
        generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
    finally:
        config.stablemask = None
        model.set_attn_implementation("sdpa")
