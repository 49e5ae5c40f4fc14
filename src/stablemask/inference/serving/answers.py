"""Generation for the server: Transformers' thread and streamer, where an answer belongs to its request."""

import asyncio
import json
import logging
from typing import Any

import torch
from fastapi import HTTPException
from tokenizers.decoders import DecodeStream
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cli.serving.utils import (
    DirectStreamer,
    GenerateManager,
    _GenerationCancelled,
    _StreamError,
    response_events_to_chunks,
)

from ...errors import InputError
from ..generate import _seeded
from ..model import check_token_ids

LOGGER = logging.getLogger("uvicorn.error")


class AnswerThread(GenerateManager):
    """Transformers' generation thread, in which an answer lives no longer than its request."""

    def __init__(self, max_model_len: int):
        super().__init__()
        self.max_model_len = max_model_len
        self._running: set[AnswerStreamer] = set()

    def close(self) -> None:
        """End every answer, and wait until the model has stopped.

        An interpreter that exits while a thread is inside PyTorch is aborted.
        """
        for streamer in list(self._running):
            streamer.cancel()
        self.submit(lambda: None).result()

    def generate_streaming(
        self,
        model: Any,
        processor: Any,
        inputs: Any,
        gen_config: Any,
        request_id: str,
        response_parser: Any = None,
    ) -> tuple[asyncio.Queue, "AnswerStreamer"]:
        ids = inputs["input_ids"]
        self._check(model, ids, gen_config)
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue = asyncio.Queue()
        streamer = AnswerStreamer(
            processor._tokenizer, loop, queue, response_parser, ids[0].tolist(), gen_config
        )

        def run() -> None:
            try:
                with _seeded(gen_config.request["seed"], model.device):
                    model.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        streamer=streamer,
                        generation_config=gen_config,
                    )
            except _GenerationCancelled:
                streamer.end()
            except Exception as error:
                LOGGER.exception("a request failed")
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                # The handlers put it between quotes as it is.
                message = json.dumps(f"the model could not answer: {reason}")[1:-1]
                loop.call_soon_threadsafe(queue.put_nowait, _StreamError(message))

        self._running.add(streamer)
        self.submit(run).add_done_callback(lambda _: self._running.discard(streamer))
        # This task ends when the answer has been sent, or its client has gone.
        task: Any = asyncio.current_task()
        task.add_done_callback(lambda _: streamer.cancel())
        return queue, streamer

    async def generate_non_streaming(  # type: ignore[override]  # as its base class has it
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        queue, streamer = self.generate_streaming(model, processor, inputs, gen_config, request_id)
        pieces: list[str] = []
        while (piece := await queue.get()) is not None:
            if isinstance(piece, _StreamError):
                raise HTTPException(500, json.loads(f'"{piece.msg}"'))
            pieces.append(piece)
        text, ids = "".join(pieces), streamer.ids
        if streamer.stopped:
            ids = processor(text, add_special_tokens=False)["input_ids"]  # without the stop text
        return text, inputs["input_ids"].shape[-1], ids

    def _check(self, model: PreTrainedModel, ids: Tensor, config: Any) -> None:
        length = ids.shape[-1]
        if length == 0:
            raise InputError("the prompt is empty; give some text")
        asked = config.max_new_tokens or 1
        if length + asked > self.max_model_len:
            raise InputError(
                f"this model's maximum context length is {self.max_model_len} tokens, the prompt has "
                f"{length} and {asked} more are asked for; shorten the prompt or lower max_tokens"
            )
        check_token_ids(model, int(ids.max()))
        if config.max_new_tokens is None:
            left = self.max_model_len - length
            config.max_new_tokens = min(config.request["default_max_tokens"] or left, left)


class AnswerStreamer(DirectStreamer):
    """Hands on the text of the new tokens as it becomes certain, up to the first stop text."""

    def __init__(
        self,
        tokenizer: Any,
        loop: asyncio.AbstractEventLoop,
        queue: asyncio.Queue,
        parser: Any,
        prompt: list[int],
        config: Any,
    ):
        super().__init__(tokenizer, loop, queue, parser)
        self.ids: list[int] = []
        self._config = config
        self._skip_special_tokens = parser is None
        # Some tokenizers drop a space at the beginning, which is not here.
        self._before = prompt[-8:]
        self._decode_stream = DecodeStream(self._before, self._skip_special_tokens)
        self._decoded = 0
        self._held = ""  # may be the beginning of a stop text
        self.stopped = False

    def put(self, value: Tensor) -> None:
        if self._cancelled.is_set():
            raise _GenerationCancelled
        if self._first:  # the prompt
            self._first = False
            return
        for token_id in value.tolist():
            self.ids.append(token_id)
            self.total_tokens += 1
            text = self._decode_stream.step(self._tokenizer, token_id) or ""
            self._decoded += len(text)
            self._write(text)

    def end(self) -> None:
        if not self.stopped:
            self._send(self._held + self._undecoded())
        if self.stopped or (self.ids and self.ids[-1] in self._config.eos_token_id):
            self._config.max_new_tokens = None  # or the handlers may take its length for the reason
        super().end()

    def _write(self, text: str) -> None:
        text = self._held + text
        stops = self._config.request["stop"]
        found = [text.index(stop) for stop in stops if stop in text]
        if found:
            self.stopped = True
            self._send(text[: min(found)])
            raise _GenerationCancelled
        longest = (range(min(len(stop) - 1, len(text)), 0, -1) for stop in stops)
        begun = [
            next((n for n in lengths if text.endswith(stop[:n])), 0)
            for stop, lengths in zip(stops, longest)
        ]
        certain = len(text) - max(begun, default=0)
        self._held = text[certain:]
        self._send(text[:certain])

    def _undecoded(self) -> str:
        """What a last token leaves that ends within a character."""
        before, whole = (
            self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)
            for ids in (self._before, self._before + self.ids)
        )
        return whole[len(before) + self._decoded :]

    def _send(self, text: str) -> None:
        if text:
            parsed = response_events_to_chunks(self._parser.feed(text)) if self._parser else [text]
            for piece in parsed:
                self._enqueue(piece)
