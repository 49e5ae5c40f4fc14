"""OpenAI's API: what a request may hold, and the form of its reply. What is not here is refused, never ignored."""

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import from_json

from ... import strict_json
from ...errors import InputError
from ...reading import first_line

LOGGER = logging.getLogger("stablemask.serve")


@dataclass
class Piece:
    """What is new of an answer. The last piece says why it ends, and how many tokens it had."""

    text: str = ""
    tokens: list[dict[str, Any]] = field(default_factory=list)  # as a chat tells log-probabilities
    finish_reason: str | None = None
    num_tokens: int = 0

    def __add__(self, more: "Piece") -> "Piece":
        text, tokens = self.text + more.text, self.tokens + more.tokens
        return Piece(text, tokens, more.finish_reason, more.num_tokens)


def _as_list(given: Any) -> Any:
    return given if isinstance(given, list) else [given]


def _as_prompts(given: Any) -> Any:
    prompts = _as_list(given)
    if all(type(item) is int for item in prompts):
        prompts = [prompts]
    for prompt in prompts:
        ids = isinstance(prompt, list) and prompt and all(type(i) is int for i in prompt)
        if not isinstance(prompt, str) and not (ids and min(prompt) >= 0):
            raise ValueError("it must be text, a list of token ids, or a list of either")
    return prompts


def _as_text(content: Any) -> Any:
    """What a message says, which may come in parts."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.keys() != {"type", "text"}:
            raise ValueError("a part must be {'type': 'text', 'text': ...}")
    return "\n".join(str(part["text"]) for part in content)


Prompts = Annotated[list[str | list[int]], Field(max_length=2048), BeforeValidator(_as_prompts)]
# The text of a stream stays behind by as many characters as the longest of them has.
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Stops = Annotated[list[Stop], Field(max_length=16), BeforeValidator(_as_list)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Part):
    include_usage: bool = False


class Request(_Part):
    """What both endpoints take; the names are OpenAI's."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: Stops = []
    n: int = Field(1, ge=1, le=128)
    # Clients send the neutral value; any other would change the answer.
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    # These do not touch the answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None


class CompletionRequest(Request):
    """Of ``/v1/completions``, and the parts of its reply that are unlike those of a chat."""

    prefix: ClassVar = "cmpl"
    kind: ClassVar = "text_completion"
    chunk_kind: ClassVar = "text_completion"

    prompt: Prompts
    max_tokens: int = Field(16, ge=0)  # as the API has it
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    best_of: Literal[1] = 1

    @property
    def prompts(self) -> list[Any]:
        return self.prompt

    @property
    def num_likeliest(self) -> int | None:
        """How many likeliest tokens are told in the place of each; None: no log-probabilities at all."""
        return self.logprobs

    def said(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def added(self, text: str, first: bool) -> dict[str, Any]:
        return {"text": text}

    def told(self, tokens: list[dict[str, Any]], offset: int) -> dict[str, Any]:
        texts = [token["token"] for token in tokens]
        # The token itself is among the likeliest, as clients look for it there.
        tops = [
            {one["token"]: one["logprob"] for one in (token, *reversed(token["top_logprobs"]))}
            for token in tokens
        ]
        return {
            "tokens": texts,
            "token_logprobs": [token["logprob"] for token in tokens],
            "top_logprobs": [top if None not in top.values() else None for top in tops],
            "text_offset": [*accumulate(map(_characters, tokens), initial=offset)][:-1],
        }


class Message(_Part):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_as_text)]
    name: str | None = None
    type: Literal["text", "message"] | None = None  # as lm-eval has it


class ChatRequest(Request):
    """Of ``/v1/chat/completions``, and the same parts."""

    prefix: ClassVar = "chatcmpl"
    kind: ClassVar = "chat.completion"
    chunk_kind: ClassVar = "chat.completion.chunk"
    echo: ClassVar = False

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(  # None: what is left of the context
        None, ge=1, validation_alias=AliasChoices("max_completion_tokens", "max_tokens")
    )
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    @model_validator(mode="after")
    def _with_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def prompts(self) -> list[Any]:
        return [[message.model_dump(exclude_none=True) for message in self.messages]]

    @property
    def num_likeliest(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def said(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def added(self, text: str, first: bool) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": text} if first else {"content": text}}

    def told(self, tokens: list[dict[str, Any]], offset: int) -> dict[str, Any]:
        return {"content": tokens}


AnyRequest = CompletionRequest | ChatRequest
Choices = AsyncIterator[tuple[int, Piece]]  # of each choice in its turn


def check_request(kind: type[AnyRequest], content: bytes, content_type: str) -> AnyRequest:
    """The request of a body, defaults filled in.

    Raises:
        InputError: it is no JSON, or a field is unknown, missing, of the wrong type or out of its range.
    """
    try:
        body = from_json(content) if content else None
    except ValueError as error:
        raise InputError(f"the body is not valid JSON: {error}") from error
    # A page of a browser may post text/plain anywhere without being asked.
    is_json = content_type.partition(";")[0].strip() == "application/json"
    if not (is_json and isinstance(body, dict)):
        raise InputError("the body must be a JSON object, sent as application/json")
    try:
        return kind.model_validate(_given(body))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    where = ascii(".".join(map(str, problem["loc"])))[1:-1]
    match problem["type"]:
        case "extra_forbidden":
            known = f"; what can be given is {', '.join(sorted(kind.model_fields))}"
            raise InputError(f"{where} is not supported{known if len(problem['loc']) == 1 else ''}")
        case "missing":
            raise InputError(f"{where} must be given")
    message = problem["msg"].removeprefix("Value error, ")
    raise InputError(f"{where}: {message}, got {ascii(problem['input'])[:80]}".removeprefix(": "))


def _given(value: Any) -> Any:
    """Without nulls and what is empty: clients send them for what they leave out."""
    if isinstance(value, dict):
        kept = {name: _given(item) for name, item in value.items()}
        return {name: item for name, item in kept.items() if item not in (None, [], {})}
    return [_given(item) for item in value] if isinstance(value, list) else value


async def whole(
    asked: AnyRequest, head: dict[str, Any], choices: Choices, usage: dict[str, int]
) -> dict[str, Any]:
    """The reply as one JSON object."""
    done: dict[int, Piece] = {}
    async for index, piece in choices:
        done[index] = done.get(index, Piece()) + piece
    listed = [_choice(asked, index, asked.said(p.text), p) for index, p in done.items()]
    return {**head, "object": asked.kind, "choices": listed, "usage": usage}


async def events(
    asked: AnyRequest, head: dict[str, Any], choices: Choices, usage: dict[str, int]
) -> AsyncIterator[str]:
    """The reply as a stream of events."""

    def event(*choices: dict[str, Any], **more: Any) -> str:
        chunk = {**head, "object": asked.chunk_kind, "choices": choices, **more}
        return f"data: {strict_json.dumps(chunk)}\n\n"

    begun, offset = -1, 0
    try:
        async for index, piece in choices:
            offset = offset if index == begun else 0
            said = asked.added(piece.text, index != begun)
            yield event(_choice(asked, index, said, piece, offset))
            begun, offset = index, offset + sum(map(_characters, piece.tokens))
        if asked.stream_options.include_usage:
            yield event(usage=usage)
    except Exception as error:
        yield f"data: {strict_json.dumps(failure(error))}\n\n"
    yield "data: [DONE]\n\n"


def _characters(token: dict[str, Any]) -> int:
    """How many characters of the text a token begins; its own name may be that of a byte."""
    if token["bytes"] is None:
        return len(token["token"])
    return sum(byte & 0xC0 != 0x80 for byte in token["bytes"])  # the others go on with one


def _choice(
    asked: AnyRequest, index: int, said: dict[str, Any], piece: Piece, offset: int = 0
) -> dict[str, Any]:
    logprobs = None if asked.num_likeliest is None else asked.told(piece.tokens, offset)
    return {"index": index, **said, "logprobs": logprobs, "finish_reason": piece.finish_reason}


def error_body(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def failure(error: Exception) -> dict[str, Any]:
    """What a client is told of an error that is not its own; the log has where it was."""
    LOGGER.error("a request failed", exc_info=error)
    return error_body(500, f"the model could not answer: {first_line(error)}")
