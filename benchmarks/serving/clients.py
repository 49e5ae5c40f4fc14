"""Clients of a server of OpenAI's API, many at once."""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pydoc_data.topics import topics
from typing import Any

import aiohttp

PATIENCE = aiohttp.ClientTimeout(total=None, sock_read=600)


@dataclass
class Told:
    """One streamed answer: seconds from the request to each piece of text, and how many tokens they were."""

    pieces: list[float] = field(default_factory=list)
    tokens: int = 0


def prompts(tokenizer: Any, lengths: Sequence[int], count: int, seed: int) -> list[str]:
    """Texts of Python's documentation, of as many tokens, each from another place."""
    draw = random.Random(seed)
    ids = tokenizer("\n".join(topics.values())[:100_000], verbose=False)["input_ids"]
    cut = []
    for _ in range(count):
        length = draw.choice(list(lengths))
        start = draw.randrange(len(ids) - length)
        cut.append(tokenizer.decode(ids[start : start + length]))
    return cut


def new_session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=PATIENCE)


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Told:
    """Stream one answer to its end."""
    told, begun = Told(), time.perf_counter()
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with session.post(f"{url}/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            if any(choice["text"] for choice in event["choices"]):
                told.pieces.append(time.perf_counter() - begun)
            told.tokens = (event.get("usage") or {}).get("completion_tokens", told.tokens)
    return told


async def load(url: str, bodies: list[dict[str, Any]], clients: int) -> tuple[list[Told], float]:
    """Have clients ask one thing after another until all has been answered: the answers, and the seconds."""
    waiting = list(bodies)
    answers: list[Told] = []
    async with new_session() as session:

        async def client() -> None:
            while waiting:
                answers.append(await ask(session, url, waiting.pop()))

        begun = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(clients)))
        return answers, time.perf_counter() - begun
