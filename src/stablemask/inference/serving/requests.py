"""What a request to the server may ask for. What is not here is refused, never ignored."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from ...errors import InputError


def _only(value: float) -> AfterValidator:
    """For what clients send in its neutral value; any other would change the answer."""

    def check(given: float) -> float:
        if given != value:
            raise ValueError(f"only {value} is supported")
        return given

    return AfterValidator(check)


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
# So long a stop text costs no more than a token does.
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
    frequency_penalty: Annotated[float, _only(0)] = 0
    presence_penalty: Annotated[float, _only(0)] = 0
    # These do not touch the answer.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None


class CompletionRequest(Request):
    prompt: Prompts
    max_tokens: int = Field(16, ge=0)  # as the API has it
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    best_of: Annotated[int, _only(1)] = 1

    @property
    def prompts(self) -> list[Any]:
        return self.prompt

    @property
    def num_likeliest(self) -> int | None:
        return self.logprobs


class Message(_Part):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_as_text)]
    name: str | None = None
    type: Literal["text", "message"] | None = None  # as lm-eval has it


class ResponseFormat(_Part):
    type: Literal["text"]


class ChatRequest(Request):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(  # None: what is left of the context
        None, ge=1, validation_alias=AliasChoices("max_completion_tokens", "max_tokens")
    )
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    response_format: ResponseFormat | None = None

    echo: ClassVar[bool] = False

    @property
    def prompts(self) -> list[Any]:
        return [[message.model_dump(exclude_none=True) for message in self.messages]]

    @property
    def num_likeliest(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    @model_validator(mode="after")
    def _with_logprobs(self) -> "ChatRequest":
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


def _given(value: Any) -> Any:
    """Without nulls and what is empty: clients send them for what they leave out."""
    if isinstance(value, str):
        value.encode()
    if isinstance(value, dict):
        kept = {_given(name): _given(item) for name, item in value.items()}
        return {name: item for name, item in kept.items() if item not in (None, [], {})}
    return [_given(item) for item in value] if isinstance(value, list) else value


def check_request(kind: type[Request], body: dict[str, Any]) -> Any:
    """The request, defaults filled in.

    Raises:
        InputError: a field is unknown, missing, of the wrong type or out of its range.
    """
    try:
        return kind.model_validate(_given(body))
    except UnicodeEncodeError as error:  # no tokenizer takes it, though JSON can escape it
        raise InputError("the body holds half of a surrogate pair, which is no text") from error
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
