"""An OpenAI-compatible server of one model: `server.py` first, then `protocol.py` and `answers.py`."""

from .server import bind, build_app, serve

__all__ = ["bind", "build_app", "serve"]
