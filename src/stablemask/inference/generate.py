"""Text from a model: Transformers' ``model.generate`` with the arguments checked first."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StopStringCriteria
from transformers.generation.streamers import BaseStreamer

from ..errors import InputError
from ..reading import first_line
from .model import check_length, check_token_ids, check_unicode, evaluating
from .streaming import decode_with_window, window_cache

# A text, or with a chat template also its messages, {"role": ..., "content": ...} each.
Prompt = str | list[dict[str, str]]
# Below it, logits would overflow and the likeliest token is certain anyway.
MIN_TEMPERATURE = 1e-5


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int | None = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    seed: int | None = None,
    prefill_chunk_size: int | None = None,
    window: int | None = None,
    chat: bool = False,
    stream: Callable[[str], Any] | None = None,
) -> list[str]:
    """Continue each prompt; a continuation ends early at the model's end token.

    Args:
        model, tokenizer: from ``load_model`` and ``load_tokenizer``.
        prompts: texts; an empty one begins a new document.
        max_new_tokens: at most so many tokens are added to each; None, with a ``window``: no limit.
        temperature: 0 takes the likeliest token each time; above it, tokens are sampled.
        top_p: sample among the likeliest tokens that hold this share of the probability.
        top_k: sample among so many likeliest tokens; None: among all.
        seed: makes sampling repeatable, and leaves the global random state as it was.
        prefill_chunk_size: read prompts so many tokens at a time, for less memory and the same result;
            None: at once, or with a ``window`` as many as it holds.
        window: let each token see itself and the ``window - 1`` tokens before it, in every layer;
            memory and time per token then stay the same however long the text is.
        chat: put each prompt through the tokenizer's chat template, as what the user says, or as the
            messages it holds.
        stream: called with each piece of text as it comes. With it, or with a ``window``, the prompts
            are continued one after another; without, they run as one left-padded batch.

    Returns:
        The continuations, without their prompts.

    Raises:
        InputError: an argument is out of its range, the model cannot have a window, the tokenizer
            has no chat template, a prompt is not Unicode, or it and its continuation are longer than a
            learned position table.
    """
    check_settings(max_new_tokens, temperature, top_p, top_k, prefill_chunk_size, window)
    if not prompts:
        return []
    # Before any work, what cannot work.
    if window is not None:
        window_cache(model, window)
    if chat:
        check_chat_template(tokenizer)
    encoded = [
        encode_prompt(
            model,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            chat=chat,
            name="the prompt" if len(prompts) == 1 else f"prompt {number}",
        )
        for number, prompt in enumerate(prompts, 1)
    ]

    settings: dict[str, Any] = {
        "max_new_tokens": sys.maxsize if max_new_tokens is None else max_new_tokens,
        "do_sample": temperature >= MIN_TEMPERATURE,
        # Any id will do where the attention mask is 0; behind an end, one that is not shown.
        "pad_token_id": tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
        # A checkpoint may ask for beams or scores, which are none of our arguments.
        "num_beams": 1,
        "num_return_sequences": 1,
        "return_dict_in_generate": False,
    }
    if model.generation_config.eos_token_id is None and tokenizer.eos_token_id is not None:
        settings["eos_token_id"] = tokenizer.eos_token_id
    # In place of a name, for `custom_generate` is not given the tokenizer that makes one of it.
    if stops := model.generation_config.stop_strings:
        settings |= {
            "stop_strings": None, "stopping_criteria": [StopStringCriteria(tokenizer, stops)],
        }  # fmt: skip
    if prefill_chunk_size is not None:
        settings["prefill_chunk_size"] = prefill_chunk_size
    if settings["do_sample"]:
        # Without a top_k Transformers takes its default of 50; 0 switches it off.
        settings |= {"temperature": temperature, "top_p": top_p, "top_k": top_k or 0}

    with evaluating(model), seeded(seed, model.device):
        if stream is None and window is None:
            return _continue(model, tokenizer, encoded, settings)
        streamer = None if stream is None else CallbackStreamer(tokenizer, stream)
        if window is not None:
            settings["custom_generate"] = partial(
                decode_with_window, window=window, streamer=streamer
            )
        else:
            settings["streamer"] = streamer
        texts = [_continue(model, tokenizer, [ids], settings) for ids in encoded]
        return [text for batch in texts for text in batch]


def check_settings(
    max_new_tokens: int | None = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int | None = None,
    prefill_chunk_size: int | None = None,
    window: int | None = None,
) -> None:
    """Raise InputError where a setting of :func:`generate` is out of its range."""
    if max_new_tokens is None and window is None:
        raise InputError("max_new_tokens may be none with a window only, which bounds the memory")
    if max_new_tokens is not None and max_new_tokens < 1:
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


def encode_prompt(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    *,
    max_new_tokens: int | None,
    chat: bool = False,
    name: str = "the prompt",
) -> list[int]:
    """The ids of a prompt.

    Raises:
        InputError: it is not Unicode, or they do not fit the model, its vocabulary or its learned position table.
    """
    if isinstance(prompt, str):
        check_unicode(prompt, name)
    ids = (_encode_chat if chat else _encode_text)(tokenizer, prompt)
    if not ids:
        if tokenizer.eos_token_id is None:
            raise InputError("an empty prompt needs a tokenizer with an end token; give some text")
        ids = [tokenizer.eos_token_id]
    check_token_ids(model, ids)
    # The last new token is not read again, so it takes no position.
    new = sys.maxsize if max_new_tokens is None else max_new_tokens
    many = "endless" if max_new_tokens is None else max_new_tokens
    check_length(model, len(ids) + new - 1, f"{name} of {len(ids)} tokens with {many} new ones")
    return ids


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError where the tokenizer has no chat template."""
    if tokenizer.chat_template is None:
        raise InputError("the tokenizer has no chat template; leave out chat")


def _encode_text(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    return tokenizer(prompt, verbose=False)["input_ids"]


def _encode_chat(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        encoded: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    # What a template raises of itself, or for messages it does not know.
    except Exception as error:
        raise InputError(f"the chat template refuses the messages: {first_line(error)}") from error
    return encoded["input_ids"]


class CallbackStreamer(BaseStreamer):
    """Hands the continuation to a function piece by piece, at the same cost for each token.

    A piece ends where a character does. A tokenizer with tokens for bytes (Llama's) makes no text of any byte in a row
    while the last character is not whole, so no row may be cut within a character either.
    """

    # Tokens that are made text again with the next ones, which they may join.
    context = 16

    def __init__(self, tokenizer: PreTrainedTokenizerBase, callback: Callable[[str], Any]):
        self.tokenizer = tokenizer
        self.callback = callback
        self.ids: list[int] = []  # whose text is whole
        self.open: list[int] = []  # behind them, with a part of a character at the end
        self.shown = 0  # characters of the text of both

    def put(self, value: Tensor) -> None:
        ids = value.flatten().tolist()
        if not self.ids:  # the prompt, which is shown already
            self._keep_last(ids)
            return
        self.open += ids
        text = self._decode(self.ids + self.open)
        whole = len(text.rstrip("\ufffd"))
        if whole < len(text) and len(self.open) < self.context:
            self._show(text, whole)
            return
        self._show(text, len(text))
        self.ids, self.open, self.shown = self.ids + self.open, [], len(text)
        if len(self.ids) > 2 * self.context:
            self._keep_last(self.ids)

    def end(self) -> None:
        # By itself, for a part of a character makes no text of the whole ones before it.
        shown = self.shown - len(self._decode(self.ids))
        if rest := self._decode(self.open)[max(0, shown) :]:
            self.callback(rest)
        self.ids, self.open, self.shown = [], [], 0

    def _keep_last(self, ids: list[int]) -> None:
        """The last tokens, from where a character begins: it has four bytes at most."""
        for more in range(4):
            self.ids = ids[-self.context - more :]
            text = self._decode(self.ids)
            self.shown = len(text)
            if not text.startswith("\ufffd"):
                break

    def _decode(self, ids: list[int]) -> str:
        # Cleaning would take back spaces that are shown already.
        return str(
            self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def _show(self, text: str, end: int) -> None:
        if end > self.shown:
            self.callback(text[self.shown : end])
            self.shown = end


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    if seed is None:
        yield
        return
    if not -(1 << 63) <= seed < 1 << 64:
        raise InputError(f"seed must be a number of 64 bits, got {seed}")
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: list[list[int]],
    settings: dict[str, Any],
) -> list[str]:
    longest = max(map(len, encoded))
    pad = settings["pad_token_id"]
    padded = [[pad] * (longest - len(ids)) + ids for ids in encoded]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in encoded]
    output = model.generate(  # type: ignore[operator]
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        **settings,
    )
    return [
        _text(tokenizer, torch.tensor(ids), row)
        for ids, row in zip(encoded, output[:, longest:].cpu(), strict=True)
    ]


def _text(tokenizer: PreTrainedTokenizerBase, prompt: Tensor, new: Tensor) -> str:
    """The text of new tokens, as a stream has it."""
    pieces: list[str] = []
    streamer = CallbackStreamer(tokenizer, pieces.append)
    for value in (prompt, *new):
        streamer.put(value)
    streamer.end()
    return "".join(pieces)
