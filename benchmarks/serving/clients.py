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
    """One streamed answer: seconds from the request to each piece that came."""

    pieces: list[float] = field(default_factory=list)
    text: str = ""
    seconds: float = 0.0


def prompts(tokenizer: Any, lengths: Sequence[int], count: int, seed: int) -> list[str]:
    """Texts of Python's documentation, of as many tokens, each from another place."""
    draw = random.Random(seed)
    ids = tokenizer("\n".join(topics.values()), verbose=False)["input_ids"]
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
    async with session.post(f"{url}/completions", json={**body, "stream": True}) as response:
        response.raise_for_status()
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            text = "".join(choice["text"] for choice in event["choices"])
            if text:
                told.pieces.append(time.perf_counter() - begun)
                told.text += text
    told.seconds = time.perf_counter() - begun
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
