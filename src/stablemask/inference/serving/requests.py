"""What a request to the server may ask for. What is not here is refused, never ignored."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

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
from pydantic_core import PydanticCustomError

from ...errors import InputError


def _encodable(text: str) -> str:
    text.encode()  # JSON may hold half of a surrogate pair, no tokenizer takes it
    return text


def _only(value: float) -> AfterValidator:
    """For what clients send in its neutral value; any other would change the answer."""

    def check(given: float) -> float:
        if given != value:
            raise ValueError(f"only {value} is supported")
        return given

    return AfterValidator(check)


Text = Annotated[str, AfterValidator(_encodable)]
# Some clients put their one prompt into a list.
Prompt = Annotated[
    Text,
    BeforeValidator(
        lambda given: given[0] if isinstance(given, list) and len(given) == 1 else given
    ),
]
# So long a stop text costs no more than a token does.
Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_encodable)]],
    Field(max_length=16),
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
]


class _Part(BaseModel):
    """A part of a request, in which a null counts as not given: clients send them for what they leave out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        given = {name: value for name, value in given.items() if value is not None}
        known = set[str]()
        for name, field in cls.model_fields.items():
            alias = field.validation_alias
            known |= set(map(str, alias.choices)) if isinstance(alias, AliasChoices) else {name}
        for name in given.keys() - known:
            raise PydanticCustomError(
                "unknown",
                "{name} is not supported; what can be given is {known}",
                {"name": ascii(name)[1:-1], "known": ", ".join(sorted(known))},
            )
        return given


class StreamOptions(_Part):
    include_usage: bool = True  # the last chunk tells it in any case


class Request(_Part):
    """What both endpoints take; the names are OpenAI's."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    stop: Stops = []
    user: str | None = None
    n: Annotated[int, _only(1)] = 1
    frequency_penalty: Annotated[float, _only(0)] = 0
    presence_penalty: Annotated[float, _only(0)] = 0


class CompletionRequest(Request):
    prompt: Prompt
    max_tokens: int | None = Field(None, ge=1)
    best_of: Annotated[int, _only(1)] = 1
    echo: Annotated[bool, _only(False)] = False


class TextPart(_Part):
    type: Literal["text"]
    text: Text


Content = Annotated[
    list[TextPart],
    BeforeValidator(
        lambda given: [{"type": "text", "text": given}] if isinstance(given, str) else given
    ),
]


class Message(_Part):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content


class ChatRequest(Request):
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(
        None, ge=1, validation_alias=AliasChoices("max_completion_tokens", "max_tokens")
    )
    logprobs: Annotated[bool, _only(False)] = False


def check_request(kind: type[Request], body: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a request by their names, defaults filled in.

    Raises:
        InputError: a field is unknown, missing, of the wrong type or out of its range.
    """
    try:
        return kind.model_validate(body).model_dump()
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
    where = ".".join(map(str, problem["loc"]))
    match problem["type"]:
        case "unknown":
            raise InputError(f"{where}.{problem['msg']}".removeprefix("."))
        case "missing":
            raise InputError(f"{where} must be given")
    message = problem["msg"].removeprefix("Value error, ")
    raise InputError(f"{where}: {message}, got {ascii(problem['input'])[:80]}")
