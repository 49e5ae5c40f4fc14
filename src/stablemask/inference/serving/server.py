"""An OpenAI-compatible HTTP server of one model: ``model.generate`` behind Starlette, no more.

The model is the one it was given, under one name. What a request asks for is honoured or refused
(`protocol.py`, which also has the form of replies), and its answer comes from the model's thread (`answers.py`).
Requests are answered one after another; many at once are vLLM's work.
"""

import asyncio
import hmac
import logging
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ... import strict_json
from ...errors import InputError
from ..model import check_length
from .answers import Answers
from .protocol import (
    LOGGER,
    AnyRequest,
    ChatRequest,
    CompletionRequest,
    check_request,
    error_body,
    events,
    failure,
    whole,
)

# Bytes. A million tokens of text, each character escaped, are as much.
MAX_BODY = 16 << 20
# Seconds in which running answers may end after Ctrl-C, before they are cut off.
PATIENCE = 1


def serve(app: ASGIApp, listener: socket.socket, ready: str) -> None:
    """Answer requests until Ctrl-C; prints the line ``ready`` first, and a line for each request to stderr.

    Args:
        app, listener: from :func:`build_app` and :func:`bind`.

    Raises:
        KeyboardInterrupt: at Ctrl-C, with everything closed.
    """
    logging.basicConfig(format="%(message)s")
    LOGGER.setLevel(logging.INFO)
    # Its own log would have a traceback of each answer that is cut off; ours has the rest.
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=PATIENCE)
    listener.listen()  # who connects from now on is answered
    print(ready, flush=True)
    uvicorn.Server(config).run(sockets=[listener])


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address, which refuses connections until it is served; port 0 takes a free one.

    Raises:
        InputError: the address does not exist here, is taken or is not allowed.
    """
    if not 0 <= port < 1 << 16:
        raise InputError(f"port must be from 0 to 65535, got {port}")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        # Or a port would stay taken for a minute after the server that had it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise InputError(
            f"cannot listen at {host} port {port}: {error.strerror}; choose others with --host and --port"
        ) from error
    return listener


def build_app(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    max_model_len: int | None = None,
    api_key: str | None = None,
    cors_origins: Sequence[str] = (),
) -> ASGIApp:
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
    api = _Api(Answers(model, tokenizer, max_model_len), name, api_key)
    app = Starlette(
        routes=[
            Route("/health", lambda _: JSONResponse({"status": "ok"})),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.models),  # a folder has slashes
            Route("/v1/completions", api.answer(CompletionRequest), methods=["POST"]),
            Route("/v1/chat/completions", api.answer(ChatRequest), methods=["POST"]),
        ],
        middleware=[
            Middleware(
                CORSMiddleware, allow_origins=cors_origins, allow_methods=["*"], allow_headers=["*"]
            )
        ],
        exception_handlers={
            InputError: lambda _, error: _error(400, str(error)),
            HTTPException: lambda _, error: _error(error.status_code, error.detail),
            ClientDisconnect: lambda *_: Response(status_code=499),
            Exception: lambda _, error: JSONResponse(failure(error), 500),
        },
        lifespan=api.lifespan,
    )
    return _Log(app)


class _Api:
    def __init__(self, answers: Answers, name: str, api_key: str | None):
        self.answers, self.name, self.created = answers, name, int(time.time())
        self.key = None if api_key is None else f"Bearer {api_key}".encode()

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        yield
        await self.answers.close()

    async def models(self, http: Request) -> Response:
        self._check_key(http)
        self._check_name(http.path_params.get("name"))
        model = {"id": self.name, "object": "model", "created": self.created}
        model |= {"owned_by": "stablemask", "max_model_len": self.answers.max_model_len}
        listed = {"object": "list", "data": [model]}
        return JSONResponse(model if "name" in http.path_params else listed)

    def answer(self, kind: type[AnyRequest]) -> Callable[[Request], Any]:
        """The handler of a route, by what its requests hold."""

        async def handle(http: Request) -> Response:
            body = await _read_body(http)
            self._check_key(http)
            asked = check_request(kind, body, http.headers.get("content-type", ""))
            self._check_name(asked.model)
            # Not in this thread, which a long text would hold up.
            ids = await asyncio.to_thread(self.answers.encode, asked)
            length = sum(map(len, ids))
            usage = {"prompt_tokens": length, "completion_tokens": 0, "total_tokens": length}
            http.scope["usage"] = usage  # for the log
            reply_id = f"{asked.prefix}-{uuid.uuid4().hex}"
            head = {"id": reply_id, "created": int(time.time()), "model": self.name}
            reply = asked, head, self.answers.choices(asked, ids, usage), usage
            if asked.stream:
                return StreamingResponse(events(*reply), media_type="text/event-stream")
            answer = await _while_connected(http, whole(*reply))
            return Response(strict_json.dumps(answer), media_type="application/json")

        return handle

    def _check_key(self, http: Request) -> None:
        given = http.headers.get("authorization", "").encode("latin-1")
        if self.key is not None and not hmac.compare_digest(given, self.key):
            raise HTTPException(401, "the API key is missing or wrong")

    def _check_name(self, asked: str | None) -> None:
        if asked not in (None, self.name):
            raise HTTPException(404, f"no model {asked!a} here; this server has {self.name!a}")


async def _read_body(http: Request) -> bytes:
    body = bytearray()
    # What is too long is dropped to its end, or the connection would be reset before the answer is read.
    async for chunk in http.stream():
        body += chunk[: MAX_BODY + 1 - len(body)]
    if len(body) > MAX_BODY:
        raise HTTPException(413, f"the body must have at most {MAX_BODY} bytes")
    return bytes(body)


async def _while_connected(http: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """What comes of it. Where the client hangs up first, it is cancelled, and ClientDisconnect raised.

    Starlette does so for a stream.
    """
    # The body has been read, so that nothing more is received but the client's leaving.
    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(http.receive())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


class _Log:
    """A line for each request of an application."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun, status = time.perf_counter(), 499  # as logs call it where nobody waits for an answer

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            if scope["type"] == "http":
                usage = scope.get("usage", {"prompt_tokens": 0, "completion_tokens": 0})
                tokens = "prompt={prompt_tokens} answer={completion_tokens}".format_map(usage)
                asked = f"{time.strftime('%H:%M:%S')} {scope['method']} {quote(scope['path'])}"
                LOGGER.info(f"{asked} {status} {time.perf_counter() - begun:.2f}s {tokens}")


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse(error_body(status, message), status)
