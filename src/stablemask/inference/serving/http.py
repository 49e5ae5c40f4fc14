"""HTTP around the application: a client that hangs up, and errors in the form that clients know."""

import asyncio
from contextlib import suppress
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...errors import InputError

# Bytes. A million tokens of text, each character escaped, are as much.
MAX_BODY = 16 << 20


def add_manners(app: FastAPI) -> None:
    """Cancel what a client no longer waits for; answer errors as OpenAI's API does."""
    app.add_exception_handler(InputError, _refuse)
    app.add_exception_handler(TemplateError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_json)
    app.add_exception_handler(StarletteHTTPException, _refuse_http)
    app.add_exception_handler(Exception, _fail)
    app.add_middleware(_EndWithClient)


class _EndWithClient:
    """Ends a request whose client hangs up, as Starlette does for streams alone, or whose body is too long."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        messages: asyncio.Queue[Message] = asyncio.Queue()

        async def listen() -> bool:
            """Hand on what comes until the client hangs up; whether it is too long.

            What is too long is dropped to its end, or the connection would be reset before the answer is
            read; but not without end.
            """
            size = 0
            message: Message = {"type": "http.request"}
            while message["type"] != "http.disconnect":
                message = await receive()
                size += len(message.get("body", b""))
                if size <= MAX_BODY:
                    messages.put_nowait(message)
                elif size > 4 * MAX_BODY or not message.get("more_body"):
                    return True
            return False

        answering: asyncio.Task = asyncio.create_task(
            self.app(scope, messages.get, send)  # type: ignore[arg-type]
        )
        listening = asyncio.create_task(listen())
        try:
            await asyncio.wait({answering, listening}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            listening.cancel()
            answering.cancel()
        with suppress(asyncio.CancelledError):
            await answering
        # A handler that awaits its body has sent nothing yet.
        if answering.cancelled() and listening.done() and listening.result():
            too_long = _answer(413, f"the body must have at most {MAX_BODY} bytes")
            await too_long(scope, receive, send)


def error_body(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _answer(status: int, message: str) -> JSONResponse:
    return JSONResponse(error_body(status, message), status)


def _refuse(request: Any, error: Exception) -> JSONResponse:
    return _answer(400, str(error))


def _refuse_json(request: Any, error: Any) -> JSONResponse:
    problem = error.errors()[0]
    if problem["type"] == "json_invalid":
        return _answer(400, f"the body is not valid JSON: {problem['ctx']['error']}")
    return _answer(400, "the body must be a JSON object, sent as application/json")


def _refuse_http(request: Any, error: Any) -> JSONResponse:
    return _answer(error.status_code, str(error.detail))


def _fail(request: Any, error: Exception) -> JSONResponse:
    return _answer(500, f"the server failed: {type(error).__name__}; its log says where")
