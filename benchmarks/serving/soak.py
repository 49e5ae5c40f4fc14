"""Many clients for some minutes, of which a third hang up and some talk nonsense: does the server last?"""

import asyncio
import random
import time
from collections import Counter
from typing import Any

import aiohttp

from stablemask.errors import RunError

from .clients import ask, new_session
from .servers import resident_mib

# What a server must refuse, each with a status of its own from 400 to 499.
NONSENSE: list[dict[str, Any]] = [
    {"prompt": 1.5},
    {"prompt": "a", "max_tokens": -1},
    {"prompt": "a", "temperature": "hot"},
    {"prompt": "a " * 100_000},
    {"prompt": "a", "model": "another"},
]
CALM = 120  # seconds in which a server must answer once all clients have gone
# What memory may grow by, from the middle of the run to its end: allocators keep what they once had.
GROWTH = 1.05


async def soak(
    url: str, pid: int, model: str, texts: list[str], clients: int, seconds: float
) -> dict:
    """What became of the requests, and the server's memory; RunError where it did not last."""
    begun = time.monotonic()
    counts: Counter[str] = Counter()
    memory: list[float] = []

    async def client(number: int) -> None:
        draw = random.Random(number)
        async with new_session() as session:
            while time.monotonic() < begun + seconds:
                counts[await _once(session, url, model, draw, texts)] += 1

    async def watch() -> None:
        while True:
            memory.append(resident_mib(pid))
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    tasks = [asyncio.create_task(client(number)) for number in range(clients)]
    await asyncio.wait(tasks, timeout=seconds)
    for task in tasks:
        task.cancel()  # which hangs up
    await asyncio.gather(*tasks, return_exceptions=True)
    body = {"model": model, "prompt": "the", "max_tokens": 4, "temperature": 0}
    asked = time.monotonic()
    async with new_session() as session:
        await asyncio.wait_for(ask(session, url, body), CALM)
    answered = time.monotonic() - asked
    watching.cancel()
    middle, end = memory[len(memory) // 2], memory[-1]
    if counts["failed"]:
        raise RunError(f"{counts['failed']} requests failed that should not have: {dict(counts)}")
    if end > GROWTH * middle:
        raise RunError(f"memory grew from {middle:.0f} MiB in the middle to {end:.0f} at the end")
    return {
        "clients": clients,
        "seconds": seconds,
        **counts,
        "seconds until it answered afterwards": round(answered, 2),
        "MiB": {"first": memory[0], "middle": middle, "end": end},
    }


async def _once(
    session: aiohttp.ClientSession, url: str, model: str, draw: random.Random, texts: list[str]
) -> str:
    body = {"model": model, "prompt": draw.choice(texts), "max_tokens": draw.randrange(1, 33)}
    kind = draw.choices(["answered", "left", "refused"], [0.55, 0.33, 0.12])[0]
    if kind == "refused":
        async with session.post(
            f"{url}/completions", json={**body, **draw.choice(NONSENSE)}
        ) as response:
            return kind if response.status // 100 == 4 else "failed"
    try:
        await asyncio.wait_for(
            ask(session, url, body), draw.uniform(0, 3) if kind == "left" else None
        )
        return "answered"
    except asyncio.TimeoutError:
        return "left"
    except (aiohttp.ClientError, RuntimeError):
        return "failed"
