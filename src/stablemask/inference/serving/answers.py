"""Answers of the model, one at a time: ``model.generate`` in a thread, told of as it goes."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ..generate import _CallbackStreamer, _seeded
from ..model import evaluating

LOGGER = logging.getLogger("uvicorn.error")


@dataclass
class Token:
    """A token's text and log-probability (the prompt's first has none), and the likeliest in its place."""

    text: str
    logprob: float | None = None
    likeliest: list[tuple[str, float]] = field(default_factory=list)


@dataclass
class Piece:
    """What is new of an answer. The last piece says why it ends, and how many tokens it had."""

    text: str
    tokens: list[Token]
    finish_reason: str | None = None
    num_tokens: int = 0


class Answers:
    """The model's thread. An answer runs no longer than the task that waits for it."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer
        self._thread = ThreadPoolExecutor(1, "model")
        self._running: set[_Answer] = set()

    def close(self) -> None:
        """End every answer, and wait until the model has stopped.

        An interpreter that exits while a thread is inside PyTorch is aborted.
        """
        for answer in self._running:
            answer.over = True
        self._thread.shutdown()

    async def stream(
        self,
        ids: list[int],
        config: Any,
        *,
        stop: list[str],
        seed: int | None = None,
        num_likeliest: int | None = None,
        score_prompt: bool = False,
    ) -> AsyncIterator[Piece]:
        """Generate as ``config`` says, up to a stop text.

        Args:
            num_likeliest: tell log-probabilities, and those of so many likeliest tokens; None: do not.
            score_prompt: tell the log-probabilities of the prompt's tokens first.

        Raises:
            RuntimeError: the model failed.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Piece | RuntimeError]()

        def emit(piece: Piece | RuntimeError) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(queue.put_nowait, piece)

        answer = _Answer(self.tokenizer, config.eos_token_id, stop, num_likeliest, emit)
        self._running.add(answer)

        def end(task: Any) -> None:
            answer.over = True
            self._running.discard(answer)

        task: Any = asyncio.current_task()
        task.add_done_callback(end)  # it has sent the answer, or its client has gone
        self._thread.submit(self._run, answer, ids, config, seed, score_prompt)
        while True:
            piece = await queue.get()
            if isinstance(piece, RuntimeError):
                raise piece
            yield piece
            if piece.finish_reason is not None:
                return

    def _run(
        self, answer: "_Answer", ids: list[int], config: Any, seed: int | None, score_prompt: bool
    ) -> None:
        if answer.over:
            return
        prompt = torch.tensor([ids], device=self.model.device)
        try:
            with evaluating(self.model), _seeded(seed, self.model.device):
                if score_prompt:
                    logits = self.model(input_ids=prompt, use_cache=False).logits
                    answer.tell_prompt(ids, logits[0, :-1])
                if config.max_new_tokens:
                    self.model.generate(  # type: ignore[operator]
                        input_ids=prompt,
                        attention_mask=torch.ones_like(prompt),
                        generation_config=config,
                        streamer=answer,
                        logits_processor=[answer.watch],
                        stopping_criteria=[answer.is_over],
                    )
            answer.finish()
        except Exception as error:
            LOGGER.exception("a request failed")
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            answer.emit(RuntimeError(f"the model could not answer: {reason}"))


class _Answer(BaseStreamer):
    """Takes tokens from ``generate``, and hands on the text that is certain."""

    def __init__(
        self,
        tokenizer: Any,
        eos: list[int],
        stops: list[str],
        num_likeliest: int | None,
        emit: Callable[[Piece | RuntimeError], None],
    ):
        self.emit = emit
        self.over = False  # a stop text has come, or nobody waits for more
        self._tokenizer, self._eos, self._stops, self._num = tokenizer, eos, stops, num_likeliest
        self._text = _CallbackStreamer(tokenizer, self._write)
        self._ids: list[int] | None = None  # until the prompt has come
        self._scores: Tensor | None = None
        self._tokens: list[Token] = []  # not handed on yet
        self._held = ""  # may be the beginning of a stop text
        self._stopped = False

    def is_over(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), self.over, device=input_ids.device)

    def watch(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """See the scores of a step, before temperature and ``top_p``."""
        if self._num is not None:
            self._scores = scores[0].float().log_softmax(-1)
        return scores

    def put(self, value: Tensor) -> None:
        if self._ids is None:
            self._ids = []
        else:
            self._ids.append(int(value))
            if self._scores is not None:
                self._tell(int(value), self._scores)
        self._text.put(value)

    def end(self) -> None:
        self._text.end()

    def finish(self) -> None:
        ids = self._ids or []
        ended = self._stopped or (ids and ids[-1] in self._eos)
        self.emit(Piece(self._held, self._tokens, "stop" if ended else "length", len(ids)))

    def tell_prompt(self, ids: list[int], logits: Tensor) -> None:
        """Log-probabilities of a prompt; logits of each token but the first, (len(ids) - 1, vocabulary)."""
        self._tokens.append(Token(self._decode(ids[0])))
        for start, rows in zip(range(1, len(ids), 256), logits.split(256)):
            for token_id, scores in zip(ids[start:], rows.float().log_softmax(-1)):
                self._tell(token_id, scores)

    def _tell(self, token_id: int, scores: Tensor) -> None:
        values, places = scores.topk(min(self._num or 0, len(scores)))
        # JSON has no infinity; this is OpenAI's.
        values, own = values.clamp(min=-9999), max(scores[token_id].item(), -9999.0)
        likeliest = zip(map(self._decode, places.tolist()), values.tolist())
        self._tokens.append(Token(self._decode(token_id), own, list(likeliest)))

    def _decode(self, token_id: int) -> str:
        text = str(self._tokenizer.decode([token_id]))
        # A part of a character is told as the vocabulary has it, so that no two look alike.
        if "\ufffd" in text:
            return str(self._tokenizer.convert_ids_to_tokens(token_id))
        return text

    def _write(self, text: str) -> None:
        if self._stopped:
            return
        text = self._held + text
        found = [text.index(stop) for stop in self._stops if stop in text]
        if found:
            self._stopped = self.over = True
            text, self._held = text[: min(found)], ""
        else:
            ends = [range(min(len(stop) - 1, len(text)), 0, -1) for stop in self._stops]
            begun = [
                next((n for n in lengths if text.endswith(stop[:n])), 0)
                for stop, lengths in zip(self._stops, ends)
            ]
            certain = len(text) - max(begun, default=0)
            text, self._held = text[:certain], text[certain:]
        if text:
            self.emit(Piece(text, self._tokens))
            self._tokens = []
