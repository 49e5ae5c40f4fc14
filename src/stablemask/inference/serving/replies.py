"""Answers in the form of OpenAI's API, whole or as a stream of events."""

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from .answers import Piece, Token

Choices = AsyncIterator[tuple[int, Piece]]  # of each choice in its turn


class Completion:
    """A reply of ``/v1/completions``."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, model: str, with_logprobs: bool):
        self.head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self.with_logprobs = with_logprobs

    async def whole(self, choices: Choices, usage: dict[str, int]) -> dict[str, Any]:
        done: list[tuple[str, list[Token], str | None]] = []
        text, tokens = "", list[Token]()
        async for _, piece in choices:
            text, tokens = text + piece.text, tokens + piece.tokens
            if piece.finish_reason is not None:
                done.append((text, tokens, piece.finish_reason))
                text, tokens = "", []
        listed = [
            {"index": index, **self.said(text), **self.end(tokens, reason)}
            for index, (text, tokens, reason) in enumerate(done)
        ]
        return {**self.head, "object": self.kind, "choices": listed, "usage": usage}

    async def events(
        self, choices: Choices, usage: dict[str, int], include_usage: bool
    ) -> AsyncIterator[str]:
        def event(*choices: dict[str, Any], **more: Any) -> str:
            chunk = {**self.head, "object": self.chunk_kind, "choices": choices, **more}
            return f"data: {json.dumps(chunk)}\n\n"

        begun = -1
        try:
            async for index, piece in choices:
                first, begun = index != begun, index
                said = self.added(piece.text, first)
                yield event({"index": index, **said, **self.end(piece.tokens, piece.finish_reason)})
            if include_usage:
                yield event(usage=usage)
        except RuntimeError as error:
            yield f"data: {json.dumps(error_body(500, str(error)))}\n\n"
        yield "data: [DONE]\n\n"

    def said(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def added(self, text: str, first: bool) -> dict[str, Any]:
        return self.said(text)

    def end(self, tokens: list[Token], finish_reason: str | None) -> dict[str, Any]:
        logprobs = self.logprobs(tokens) if self.with_logprobs else None
        return {"logprobs": logprobs, "finish_reason": finish_reason}

    def logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        # The token itself is among them, as clients look for it there.
        tops = [
            None if t.logprob is None else {t.text: t.logprob, **dict(reversed(t.likeliest))}
            for t in tokens
        ]
        return {
            "tokens": [t.text for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": tops,
            "text_offset": [sum(len(t.text) for t in tokens[:i]) for i in range(len(tokens))],
        }


class Chat(Completion):
    """A reply of ``/v1/chat/completions``."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def said(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def added(self, text: str, first: bool) -> dict[str, Any]:
        return {"delta": {**({"role": "assistant"} if first else {}), "content": text}}

    def logprobs(self, tokens: list[Token]) -> dict[str, Any]:
        def entry(text: str, logprob: float | None) -> dict[str, Any]:
            return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

        return {
            "content": [
                {**entry(t.text, t.logprob), "top_logprobs": [entry(*top) for top in t.likeliest]}
                for t in tokens
            ]
        }


def error_body(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}
