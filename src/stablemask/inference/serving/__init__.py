"""An OpenAI-compatible server of one model: `server.py` first, then `requests.py`, `answers.py`, `replies.py`."""

from .server import bind, build_app, ready_line, serve, url

__all__ = ["bind", "build_app", "ready_line", "serve", "url"]
