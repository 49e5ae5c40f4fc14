"""An OpenAI-compatible HTTP server of one model: ``model.generate`` behind Starlette, no more.

The model is the one it was given, under one name. What a request asks for is honoured or refused
(`requests.py`), its answer comes from the model's thread (`answers.py`) and is put into OpenAI's form
(`replies.py`). Requests are answered one after another; many at once are vLLM's work.
"""

import asyncio
import copy
import hmac
import json
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import quote

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import InputError
from ..generate import encode_prompt
from ..model import check_length, check_token_ids
from .answers import Answers, Piece
from .replies import Chat, Completion, error_body
from .requests import ChatRequest, CompletionRequest, check_request

LOGGER = logging.getLogger("stablemask.serve")
# Bytes. A million tokens of text, each character escaped, are as much.
MAX_BODY = 16 << 20
# Below it, logits would overflow and the likeliest token is certain anyway.
MIN_TEMPERATURE = 1e-5
# Seconds in which running answers may end after Ctrl-C, before they are cut off.
PATIENCE = 1


def serve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    listener: socket.socket,
    **settings: Any,
) -> None:
    """Answer requests until Ctrl-C, one after another; prints a line when ready, logs each to stderr.

    Args:
        model, tokenizer, name, settings: as :func:`build_app` takes them.
        listener: from ``bind``.

    Raises:
        InputError: as :func:`build_app`.
        KeyboardInterrupt: at Ctrl-C, with everything closed.
    """
    app = build_app(model, tokenizer, name=name, **settings)
    logging.basicConfig(format="%(message)s")
    LOGGER.setLevel(logging.INFO)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=PATIENCE
    )
    _Server(config, ready_line(name, url(listener))).run(sockets=[listener])


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address, which refuses connections until it is served; port 0 takes a free one.

    Raises:
        InputError: the address does not exist here, is taken or is not allowed.
    """
    # getaddrinfo takes a greater port for another one.
    if not 0 <= port < 1 << 16:
        raise InputError(f"port must be from 0 to 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            # Or a port would stay taken for a minute after the server that had it.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise InputError(
            f"cannot listen at {host} port {port}: {error.strerror}; choose others with --host and --port"
        ) from error
    return listener


def url(listener: socket.socket) -> str:
    """Where a client finds it, such as ``http://127.0.0.1:8000``."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def ready_line(name: str, address: str) -> str:
    return f"serving {name} at {address}/v1; Ctrl-C ends it"


def build_app(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    max_model_len: int | None = None,
    api_key: str | None = None,
    cors_origins: Sequence[str] = (),
) -> Starlette:
    """The application behind :func:`serve`, for any ASGI server.

    Args:
        model, tokenizer: from ``load_model`` and ``load_tokenizer``.
        name: what requests call the model.
        max_model_len: most tokens of a prompt and its answer together; None: the model's
            ``max_position_embeddings``.
        api_key: what requests must bring as ``Authorization: Bearer KEY``; None: nothing.
        cors_origins: of web pages that may ask, such as ``"https://chat.example"``.

    Raises:
        InputError: the model has no ``max_position_embeddings``, or a position table shorter than
            ``max_model_len``.
    """
    if max_model_len is None:
        config = model.config.get_text_config()
        max_model_len = getattr(config, "max_position_embeddings", None)
        if max_model_len is None:
            raise InputError(f"{name} does not say how long its context is; give --max-model-len")
    if max_model_len < 2:
        raise InputError(
            f"max_model_len must be at least 2, a token and its answer, got {max_model_len}"
        )
    check_length(model, max_model_len, f"max_model_len {max_model_len}")
    api = _Api(model, tokenizer, name, max_model_len)
    return Starlette(
        routes=[
            Route("/health", lambda _: JSONResponse({"status": "ok"})),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.models),  # a folder has slashes
            Route("/v1/completions", api.answer(CompletionRequest, Completion), methods=["POST"]),
            Route("/v1/chat/completions", api.answer(ChatRequest, Chat), methods=["POST"]),
        ],
        middleware=[
            Middleware(
                CORSMiddleware, allow_origins=cors_origins, allow_methods=["*"], allow_headers=["*"]
            ),
            Middleware(_Doorway, api_key=api_key),
        ],
        exception_handlers={InputError: _refuse, HTTPException: _refuse, Exception: _fail},
        lifespan=api.lifespan,
    )


class _Api:
    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        max_model_len: int,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.name, self.max_model_len, self.created = name, max_model_len, int(time.time())
        self.answers = Answers(model, tokenizer)

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        self.answers.close()

    async def models(self, http: Request) -> Response:
        self._check_name(http.path_params.get("name"))
        model = {"id": self.name, "object": "model", "created": self.created}
        model |= {"owned_by": "stablemask", "max_model_len": self.max_model_len}
        listed = {"object": "list", "data": [model]}
        return JSONResponse(model if "name" in http.path_params else listed)

    def answer(self, kind: type[Any], form: type[Completion]) -> Callable[[Request], Any]:
        """The handler of a route: what its requests may hold, and the form of its replies."""

        async def handle(http: Request) -> Response:
            asked = check_request(kind, await _json(http))
            self._check_name(asked.model)
            if kind is ChatRequest and self.tokenizer.chat_template is None:
                raise InputError(
                    "this model has no chat template, so it cannot be talked to; use /v1/completions"
                )
            # Not in this thread, which a long text would hold up.
            ids = [await asyncio.to_thread(self._encode, prompt, asked) for prompt in asked.prompts]
            length = sum(map(len, ids))
            usage = {"prompt_tokens": length, "completion_tokens": 0, "total_tokens": length}
            http.scope["usage"] = usage  # for the log
            choices = self._choices(asked, ids, usage)
            reply = form(self.name, asked.num_likeliest is not None)
            if asked.stream:
                events = reply.events(choices, usage, asked.stream_options.include_usage)
                return StreamingResponse(events, media_type="text/event-stream")
            try:
                return JSONResponse(await reply.whole(choices, usage))
            except RuntimeError as error:
                raise HTTPException(500, str(error)) from error

        return handle

    async def _choices(
        self, asked: Any, encoded: list[list[int]], usage: dict[str, int]
    ) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of each choice of each prompt, by the place of the choice."""
        for index in range(asked.n * len(encoded)):
            place, choice = divmod(index, asked.n)
            ids, prompt = encoded[place], asked.prompts[place]
            if asked.echo:
                text = prompt if isinstance(prompt, str) else str(self.tokenizer.decode(ids))
                yield index, Piece(text, [])
            async for piece in self.answers.stream(
                ids,
                self._config(asked, len(ids)),
                stop=asked.stop,
                seed=None if asked.seed is None else (asked.seed + choice) % (1 << 63),
                num_likeliest=asked.num_likeliest,
                score_prompt=asked.echo and asked.num_likeliest is not None,
            ):
                usage["completion_tokens"] += piece.num_tokens
                usage["total_tokens"] += piece.num_tokens
                yield index, piece

    def _encode(self, prompt: Any, asked: Any) -> list[int]:
        if isinstance(prompt, list) and isinstance(prompt[0], int):
            ids = prompt
        else:
            chat = not isinstance(prompt, str)
            ids = encode_prompt(self.model, self.tokenizer, prompt, max_new_tokens=1, chat=chat)
        check_token_ids(self.model, max(ids))
        new = 1 if asked.max_tokens is None else asked.max_tokens
        if len(ids) + new > self.max_model_len:
            raise InputError(
                f"this model's maximum context length is {self.max_model_len} tokens, the prompt has "
                f"{len(ids)} and {new} more are asked for; shorten the prompt or lower max_tokens"
            )
        return ids

    def _config(self, asked: Any, prompt_len: int) -> Any:
        config: Any = copy.deepcopy(self.model.generation_config)
        left = self.max_model_len - prompt_len
        config.max_new_tokens = left if asked.max_tokens is None else asked.max_tokens
        if asked.temperature is not None or asked.top_p is not None:
            config.do_sample = asked.temperature is None or asked.temperature >= MIN_TEMPERATURE
        if config.do_sample:
            config.temperature = asked.temperature or config.temperature
            config.top_p = asked.top_p or config.top_p
            config.top_k = config.top_k or 0  # a None would become Transformers' default of 50
        eos = config.eos_token_id
        if eos is None:
            eos = self.tokenizer.eos_token_id
        config.eos_token_id = eos if isinstance(eos, list) else [eos]
        config.pad_token_id = self.tokenizer.pad_token_id
        return config

    def _check_name(self, asked: str | None) -> None:
        if asked not in (None, self.name):
            raise HTTPException(404, f"no model {asked!a} here; this server has {self.name!a}")


async def _json(http: Request) -> dict[str, Any]:
    # A page of a browser may post text/plain anywhere without being asked.
    content, kind = await http.body(), http.headers.get("content-type", "").partition(";")[0]
    if content and kind.strip() == "application/json":
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError(f"the body is not valid JSON: {error}") from error
        if isinstance(body, dict):
            return body
    raise InputError("the body must be a JSON object, sent as application/json")


class _Doorway:
    """Asks for the key, reads the body, ends a request whose client hangs up, and logs each."""

    def __init__(self, app: ASGIApp, api_key: str | None):
        self.app = app
        self.key: Any = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        begun, status = time.perf_counter(), 499  # as logs call a client that has gone

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            body = await _read_body(receive)
            if refusal := self._refusal(scope, body):
                return await refusal(scope, receive, watched)
            messages: asyncio.Queue[Message] = asyncio.Queue()
            messages.put_nowait({"type": "http.request", "body": body})
            tasks = [
                asyncio.ensure_future(self.app(scope, messages.get, watched)),
                asyncio.ensure_future(receive()),  # nothing comes any more, but for its leaving
            ]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
            with suppress(asyncio.CancelledError):
                await tasks[0]
        except Exception:
            status = 500
            raise
        finally:
            usage = scope.get("usage", {"prompt_tokens": 0, "completion_tokens": 0})
            LOGGER.info(
                "%s %s %s %s %.2fs prompt=%d answer=%d",
                time.strftime("%H:%M:%S"),
                scope["method"],
                quote(scope["path"]),
                status,
                time.perf_counter() - begun,
                usage["prompt_tokens"],
                usage["completion_tokens"],
            )

    def _refusal(self, scope: Scope, body: bytes) -> JSONResponse | None:
        given = dict(scope["headers"]).get(b"authorization", b"")
        locked = self.key is not None and scope["path"].startswith("/v1")
        if locked and not hmac.compare_digest(given, self.key):
            return _error(401, "the API key is missing or wrong")
        if len(body) > MAX_BODY:
            return _error(413, f"the body must have at most {MAX_BODY} bytes")
        return None


async def _read_body(receive: Receive) -> bytes:
    """What is too long is dropped to its end, or the connection would be reset before the answer is read;
    but not without end."""
    body, size, more = bytearray(), 0, True
    while more and size <= 4 * MAX_BODY:
        message = await receive()
        more = message.get("more_body", False)
        size += len(message.get("body", b""))
        if len(body) <= MAX_BODY:
            body += message.get("body", b"")
    return bytes(body)


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse(error_body(status, message), status)


def _refuse(request: Any, error: Any) -> JSONResponse:
    return _error(getattr(error, "status_code", 400), getattr(error, "detail", str(error)))


def _fail(request: Any, error: Exception) -> JSONResponse:
    return _error(500, f"the server failed: {type(error).__name__}; its log says where")


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: str):
        super().__init__(config)
        self.ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self.ready, flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Answers cut off are no errors.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)
