"""An OpenAI-compatible HTTP server of one model: the one that Transformers ships, kept to the API.

The application, its handlers and its generation thread are Transformers' own
(``transformers.cli.serving``). What is here makes them hold what the API promises: the model is the one
``load_model`` gave and no request can load, unload or name another; what a request asks for is honoured
or refused (`requests.py`); a seed belongs to its request; a stop text ends the answer and is not in it;
a client that hangs up frees the model; errors and ends of streams look as clients expect.
"""

import copy
import json
import logging
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import (
    BaseHandler,
    GenerateManager,
    GenerationState,
)

from ...errors import InputError
from ..model import check_length
from .answers import AnswerThread
from .http import add_manners, error_body
from .requests import ChatRequest, CompletionRequest, Request, check_request

ROUTES = {"/v1/chat/completions", "/v1/completions", "/health"}
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
    max_model_len: int | None = None,
) -> None:
    """Answer requests until Ctrl-C, one after another; prints a line when ready.

    Args:
        model, tokenizer: from ``load_model`` and ``load_tokenizer``.
        name: what requests call the model.
        listener: from ``bind``.
        max_model_len: most tokens of a prompt and its answer together; None: the model's
            ``max_position_embeddings``.

    Raises:
        InputError: the model has no ``max_position_embeddings``, or a position table shorter than
            ``max_model_len``.
        KeyboardInterrupt: at Ctrl-C, with everything closed.
    """
    app = build_app(model, tokenizer, name=name, max_model_len=max_model_len)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=PATIENCE
    )
    _Server(config, f"{name} at {_url(listener)}/v1").run(sockets=[listener])


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


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def build_app(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    name: str,
    max_model_len: int | None = None,
) -> FastAPI:
    """The application behind ``serve``, for any ASGI server; the arguments are those of ``serve``."""
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

    answers = AnswerThread(max_model_len)
    manager = _OneModel(model, tokenizer, name, answers)
    state = _OneThread(answers)
    served: dict[str, Any] = {"model_manager": manager, "generation_state": state}
    none: Any = None  # the handlers of the routes that are dropped
    app = build_server(
        manager,
        _ChatHandler(**served),
        completion_handler=_CompletionHandler(**served),
        response_handler=none,
        transcription_handler=none,
        systemone_handler=none,
        generation_state=state,
    )
    # The others load and unload models at a client's word, or are not tested here.
    app.router.routes[:] = [r for r in app.router.routes if getattr(r, "path", None) in ROUTES]
    _describe(app, name)
    add_manners(app)
    return app


def _describe(app: FastAPI, name: str) -> None:
    """The routes that tell which model there is, in OpenAI's fields and no more."""
    model = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "stablemask"}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{asked:path}")  # a folder has slashes
    def one(asked: str) -> dict[str, Any]:
        _check_name(asked, name)
        return model


def _check_name(asked: str, served: str) -> None:
    if asked != served:
        raise HTTPException(404, f"no model {asked!a} here; this server has {served!a}")


class _OneModel(ModelManager):
    """The model that was loaded, under the name it was given, for as long as the server lives."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        answers: AnswerThread,
    ):
        self.model, self.tokenizer, self.answers = model, tokenizer, answers
        super().__init__(force_model=name)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id  # a folder has no revision

    def _load_processor(self, *args: Any, **kwargs: Any) -> Any:
        return self.tokenizer

    def _load_model(self, *args: Any, **kwargs: Any) -> PreTrainedModel:
        return self.model

    def shutdown(self) -> None:
        """The model is its caller's, to keep or to drop; no answer runs in it any more."""
        self.answers.close()


class _OneThread(GenerationState):
    def __init__(self, answers: AnswerThread):
        super().__init__()
        self._thread = answers

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        return self._thread


class _Checked(BaseHandler):
    """Checks a request before anything runs, and makes of it the settings of its generation."""

    request_type: type[Request]
    max_tokens: int | None = None  # where a request does not say; None: what is left of the context

    def _validate_request(self, body: dict) -> None:
        request = check_request(self.request_type, body)
        served = str(self.model_manager.force_model)
        _check_name(request["model"] or served, served)
        body.clear()
        body.update(request)

    def _build_generation_config(
        self, body: dict, model_generation_config: GenerationConfig, use_cb: bool = False
    ) -> GenerationConfig:
        config: Any = copy.deepcopy(model_generation_config)
        config.max_new_tokens = body["max_tokens"]
        if body["temperature"] is not None or body["top_p"] is not None:
            config.do_sample = body["temperature"] is None or body["temperature"] >= MIN_TEMPERATURE
        if config.do_sample:
            config.temperature = body["temperature"] or config.temperature
            config.top_p = body["top_p"] or config.top_p
            config.top_k = config.top_k or 0  # a None would become Transformers' default of 50
        eos = config.eos_token_id
        if eos is None:
            eos = self.model_manager.tokenizer.eos_token_id  # type: ignore[attr-defined]
        config.eos_token_id = eos if isinstance(eos, list) else [eos]
        # What no GenerationConfig knows, for AnswerThread.
        config.request = {
            "seed": body["seed"],
            "stop": body["stop"],
            "default_max_tokens": self.max_tokens,
        }
        return config

    def _streaming(self, *args: Any, **kwargs: Any) -> StreamingResponse:
        response = super()._streaming(*args, **kwargs)  # type: ignore[misc]
        response.body_iterator = _as_clients_expect(response.body_iterator)
        return response


async def _as_clients_expect(chunks: AsyncIterator[str]) -> AsyncIterator[str]:
    start = 'data: {"error": '  # of an event: anywhere else, quotes are escaped
    async for chunk in chunks:
        if start in chunk:
            events, _, message = chunk.partition(start)
            error = error_body(500, json.loads(message.strip().removesuffix("}")))
            chunk = f"{events}data: {json.dumps(error)}\n\n"
        yield chunk
    yield "data: [DONE]\n\n"


class _CompletionHandler(_Checked, CompletionHandler):
    request_type = CompletionRequest
    max_tokens = 16  # as the API has it

    def _validate_request(self, body: dict) -> None:
        super()._validate_request(body)
        tokenizer = self.model_manager.tokenizer  # type: ignore[attr-defined]
        if not body["prompt"] and not tokenizer("")["input_ids"]:
            body["prompt"] = tokenizer.eos_token  # which begins a new document


class _ChatHandler(_Checked, ChatCompletionHandler):
    request_type = ChatRequest

    def _validate_request(self, body: dict) -> None:
        super()._validate_request(body)
        if self.model_manager.tokenizer.chat_template is None:  # type: ignore[attr-defined]
            raise InputError(
                "this model has no chat template, so it cannot be talked to; use /v1/completions"
            )


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, place: str):
        super().__init__(config)
        self.place = place

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(f"serving {self.place}; Ctrl-C ends it", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        # Answers cut off are no errors.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        await super().shutdown(sockets)
