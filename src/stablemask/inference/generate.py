"""Text from a model: Transformers' ``model.generate`` with the arguments checked first."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from ..errors import InputError
from .model import check_length, check_token_ids, evaluating


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
    prefill_chunk_size: int | None = None,
    stream: Callable[[str], Any] | None = None,
) -> list[str]:
    """Continue each prompt; a continuation ends early at the model's end token.

    Args:
        model, tokenizer: from ``load_model`` and ``load_tokenizer``.
        prompts: texts; an empty one begins a new document.
        max_new_tokens: at most so many tokens are added to each.
        temperature: 0 takes the likeliest token each time; above it, tokens are sampled.
        top_p: sample among the likeliest tokens that hold this share of the probability.
        top_k: sample among so many likeliest tokens; None: among all.
        seed: makes sampling repeatable, and leaves the global random state as it was.
        prefill_chunk_size: read prompts so many tokens at a time, for less memory and the same result;
            None: at once.
        stream: called with each piece of text as it comes. The prompts are then continued one
            after another; without it they run as one left-padded batch.

    Returns:
        The continuations, without their prompts.

    Raises:
        InputError: an argument is out of its range, or a prompt and its continuation are longer
            than a learned position table.
    """
    _check(max_new_tokens, temperature, top_p, top_k, prefill_chunk_size)
    if not prompts:
        return []
    encoded = [_encode(model, tokenizer, prompt) for prompt in prompts]
    for number, ids in enumerate(encoded, 1):
        which = "the prompt" if len(prompts) == 1 else f"prompt {number}"
        # The last new token is not read again, so it takes no position.
        check_length(
            model,
            len(ids) + max_new_tokens - 1,
            f"{which} of {len(ids)} tokens with {max_new_tokens} new ones",
        )

    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": temperature > 0,
        # Any id will do where the attention mask is 0.
        "pad_token_id": tokenizer.pad_token_id or 0,
    }
    if model.generation_config.eos_token_id is None and tokenizer.eos_token_id is not None:
        settings["eos_token_id"] = tokenizer.eos_token_id
    if prefill_chunk_size is not None:
        settings["prefill_chunk_size"] = prefill_chunk_size
    if temperature > 0:
        # Without a top_k Transformers takes its default of 50; 0 switches it off.
        settings |= {"temperature": temperature, "top_p": top_p, "top_k": top_k or 0}

    with evaluating(model), _seeded(seed, model.device):
        if stream is None:
            return _continue(model, tokenizer, encoded, settings)
        streamer = _CallbackStreamer(tokenizer, stream)
        texts = [_continue(model, tokenizer, [ids], settings, streamer) for ids in encoded]
        return [text for batch in texts for text in batch]


class _CallbackStreamer(TextStreamer):
    """Hands each finished piece of the continuation to a function."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, callback: Callable[[str], Any]):
        super().__init__(tokenizer, skip_special_tokens=True)
        self.callback = callback

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            return super().put(value)
        # The prompt stays in the cache, shown already: some tokenizers drop a leading space.
        self.next_tokens_are_prompt = False
        self.token_cache = value.flatten().tolist()
        self.print_len = len(self.tokenizer.decode(self.token_cache, **self.decode_kwargs))

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self.callback(text)


def _check(
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
    prefill_chunk_size: int | None,
) -> None:
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature must be 0 (greedy) or a positive number, got {temperature}")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be greater than 0 and at most 1, got {top_p}")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k must be at least 1, got {top_k}")
    if prefill_chunk_size is not None and prefill_chunk_size < 1:
        raise InputError(f"prefill_chunk_size must be at least 1, got {prefill_chunk_size}")
    if temperature == 0 and (top_p < 1 or top_k is not None):
        raise InputError("top_p and top_k need a temperature above 0, got temperature 0 (greedy)")


def _encode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    ids = tokenizer(prompt, verbose=False)["input_ids"]
    if not ids:
        if tokenizer.eos_token_id is None:
            raise InputError("an empty prompt needs a tokenizer with an end token; give some text")
        ids = [tokenizer.eos_token_id]
    check_token_ids(model, max(ids))
    return ids


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: list[list[int]],
    settings: dict[str, Any],
    streamer: TextStreamer | None = None,
) -> list[str]:
    longest = max(map(len, encoded))
    pad = settings["pad_token_id"]
    padded = [[pad] * (longest - len(ids)) + ids for ids in encoded]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in encoded]
    output = model.generate(  # type: ignore[operator]
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        streamer=streamer,
        **settings,
    )
    texts = []
    for ids, row in zip(encoded, output[:, longest:].tolist(), strict=True):
        prefix, text = (
            str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in (ids, ids + row)
        )
        texts.append(text[len(prefix) :])
    return texts
