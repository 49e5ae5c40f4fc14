"""Answers of the model, one at a time: ``model.generate`` in a thread, told of as it goes."""

import asyncio
import copy
import re
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import InputError
from ..generate import MIN_TEMPERATURE, CallbackStreamer, encode_prompt, seeded
from ..model import check_token_ids, evaluating
from .protocol import AnyRequest, ChatRequest, Choices, Piece

# How a byte-level vocabulary spells bytes: those that print by themselves, the others by characters from 256 on.
_PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))
_UNPRINTED = (byte for byte in range(256) if byte not in _PRINTED)
BYTES = {chr(byte): byte for byte in _PRINTED} | {
    chr(256 + number): byte for number, byte in enumerate(_UNPRINTED)
}


class Answers:
    """The model, and the thread it runs in."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_model_len: int
    ):
        self.model, self.tokenizer, self.max_model_len = model, tokenizer, max_model_len
        self._thread = ThreadPoolExecutor(1, "model")

    async def close(self) -> None:
        """Wait until the model has stopped.

        An interpreter that exits while a thread is inside PyTorch is aborted.
        """
        await asyncio.to_thread(self._thread.shutdown)

    def encode(self, asked: AnyRequest) -> list[list[int]]:
        """The ids of its prompts.

        Raises:
            InputError: they do not fit the model, or leave no room for the answer.
        """
        if isinstance(asked, ChatRequest) and self.tokenizer.chat_template is None:
            raise InputError(
                "this model has no chat template, so it cannot be talked to; use /v1/completions"
            )
        return [self._encode(asked, prompt) for prompt in asked.prompts]

    def _encode(self, asked: AnyRequest, prompt: Any) -> list[int]:
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            ids = prompt
            check_token_ids(self.model, ids)
        else:
            chat = isinstance(asked, ChatRequest)
            ids = encode_prompt(self.model, self.tokenizer, prompt, max_new_tokens=1, chat=chat)
        new = 1 if asked.max_tokens is None else asked.max_tokens
        if len(ids) + new > self.max_model_len:
            raise InputError(
                f"this model's maximum context length is {self.max_model_len} tokens, the prompt has "
                f"{len(ids)} and {new} more are asked for; shorten the prompt or lower max_tokens"
            )
        return ids

    async def choices(
        self, asked: AnyRequest, encoded: list[list[int]], usage: dict[str, int]
    ) -> Choices:
        """The pieces of each choice of each prompt, by the place of the choice; ``usage`` is kept up.

        Raises:
            Exception: what the model raised.
        """
        for index in range(asked.n * len(encoded)):
            place, number = divmod(index, asked.n)
            ids, prompt = encoded[place], asked.prompts[place]
            if asked.echo:
                text = prompt if isinstance(prompt, str) else str(self.tokenizer.decode(ids))
                yield index, Piece(text)
            async for piece in self._stream(asked, ids, number):
                usage["completion_tokens"] += piece.num_tokens
                usage["total_tokens"] += piece.num_tokens
                yield index, piece

    async def _stream(self, asked: AnyRequest, ids: list[int], number: int) -> AsyncIterator[Piece]:
        """One answer. It runs no longer than the present task waits for it."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Piece | None]()
        task: Any = asyncio.current_task()

        def emit(piece: Piece) -> None:
            loop.call_soon_threadsafe(queue.put_nowait, piece)

        config = self._config(asked, len(ids))
        seed = None if asked.seed is None else (asked.seed + number) % (1 << 63)
        answer = _Answer(self.tokenizer, asked, config, emit, task.done)
        run = loop.run_in_executor(self._thread, self._run, answer, ids, config, seed)
        run.add_done_callback(lambda _: queue.put_nowait(None))
        while (piece := await queue.get()) is not None:
            yield piece
        await run  # for what it raised

    def _config(self, asked: AnyRequest, prompt_len: int) -> Any:
        config: Any = copy.deepcopy(self.model.generation_config)
        config.num_beams = config.num_return_sequences = 1  # beams cannot be told as they go
        left = self.max_model_len - prompt_len
        config.max_new_tokens = left if asked.max_tokens is None else asked.max_tokens
        if asked.temperature is not None or asked.top_p is not None:
            config.do_sample = asked.temperature is None or asked.temperature >= MIN_TEMPERATURE
        if config.do_sample:
            config.temperature = asked.temperature or config.temperature
            config.top_p = asked.top_p or config.top_p
            config.top_k = config.top_k or 0  # a None would become Transformers' default of 50
        if config.eos_token_id is None:
            config.eos_token_id = self.tokenizer.eos_token_id
        config.pad_token_id = self.tokenizer.pad_token_id
        return config

    def _run(self, answer: "_Answer", ids: list[int], config: Any, seed: int | None) -> None:
        if answer.is_over():
            return
        prompt = torch.tensor([ids], device=self.model.device)
        with evaluating(self.model), seeded(seed, self.model.device):
            if answer.scores_prompt:
                logits = self.model(input_ids=prompt, use_cache=False).logits
                answer.tell_prompt(ids, logits[0, :-1])
            if config.max_new_tokens:
                self.model.generate(  # type: ignore[operator]
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    generation_config=config,
                    streamer=answer,
                    logits_processor=[answer.watch],
                    stopping_criteria=[answer.criterion],
                    tokenizer=self.tokenizer,  # for `stop_strings` of the model's own
                )
        answer.finish()


class _Answer(CallbackStreamer):
    """Takes tokens from ``generate``, and hands on the text that is certain."""

    def __init__(
        self,
        tokenizer: Any,
        asked: AnyRequest,
        config: Any,
        emit: Callable[[Piece], Any],
        is_left: Callable[[], bool],
    ):
        super().__init__(tokenizer, self._write)
        self._stops, self._num = asked.stop, asked.num_likeliest
        eos = config.eos_token_id
        self._eos, self._most = eos if isinstance(eos, list) else [eos], config.max_new_tokens
        self.scores_prompt = asked.echo and self._num is not None
        self._emit, self._is_left = emit, is_left
        self._new: list[int] = []
        self._log_probs: Tensor | None = None  # of the next token, (1, vocabulary)
        self._tokens: list[dict[str, Any]] = []  # not handed on yet
        # The end of the text may be the beginning of a stop text.
        self._held, self._most_held = "", max(map(len, self._stops), default=1) - 1
        self._stopped = False

    def is_over(self) -> bool:
        return self._stopped or self._is_left()

    def criterion(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.is_over(), device=input_ids.device)

    def watch(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See the scores of a step, before temperature and ``top_p``."""
        if self._num is not None:
            self._log_probs = _log_probs(scores)
        return scores

    def put(self, value: Tensor) -> None:
        if self.ids:  # else this is the prompt
            self._new.append(int(value))
            if self._log_probs is not None:
                self._tell(self._new[-1:], self._log_probs)
        super().put(value)

    def finish(self) -> None:
        full = len(self._new) == self._most
        ended = self._stopped or not full or (self._new and self._new[-1] in self._eos)
        reason = "stop" if ended else "length"
        self._emit(Piece(self._held, self._tokens, reason, len(self._new)))

    def tell_prompt(self, ids: list[int], logits: Tensor) -> None:
        """Log-probabilities of a prompt; logits of each token but the first, (len(ids) - 1, vocabulary)."""
        self._tokens.append(self._entry(ids[0], None) | {"top_logprobs": []})
        for start, rows in zip(range(1, len(ids), 256), logits.split(256)):
            self._tell(ids[start : start + 256], _log_probs(rows))

    def _tell(self, ids: list[int], log_probs: Tensor) -> None:
        values, places = log_probs.topk(min(self._num or 0, log_probs.shape[-1]))
        for token_id, row, *top in zip(ids, log_probs, places.tolist(), values.tolist()):
            entry = self._entry(token_id, row[token_id].item())
            self._tokens.append(entry | {"top_logprobs": list(map(self._entry, *top))})

    def _entry(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        # Behind another token, for some tokenizers drop a space at the beginning of a text.
        before, text = (str(self.tokenizer.decode([token_id] * count)) for count in (1, 2))
        text = text[len(before) :]
        spelled: list[int] | None = list(text.encode())
        # A part of a character is told as the vocabulary has it, so that no two look alike.
        if "\ufffd" in before:
            text = str(self.tokenizer.convert_ids_to_tokens(token_id))
            spelled = _spelled(text)
        return {"token": text, "logprob": logprob, "bytes": spelled}

    def _write(self, text: str) -> None:
        if self._stopped:
            return
        text = self._held + text
        found = [text.index(stop) for stop in self._stops if stop in text]
        self._stopped = bool(found)
        certain = min(found) if found else max(0, len(text) - self._most_held)
        self._held = "" if found else text[certain:]
        if certain:
            self._emit(Piece(text[:certain], self._tokens))
            self._tokens = []


def _spelled(token: str) -> list[int] | None:
    """The bytes of a token that a vocabulary spells, as ``<0xE2>`` or by characters for bytes; None of another."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
        return [int(token[3:5], 16)]
    return [BYTES[character] for character in token] if BYTES.keys() >= set(token) else None


def _log_probs(logits: Tensor) -> Tensor:
    # JSON has no infinity; this is OpenAI's.
    return logits.float().log_softmax(-1).clamp(min=-9999)
