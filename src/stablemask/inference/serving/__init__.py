"""An OpenAI-compatible server: `server.py` first, then `requests.py`, `answers.py`, `http.py`."""

from .server import bind, build_app, serve

__all__ = ["bind", "build_app", "serve"]
