"""Servers side by side under load, and one that is to last.

    python -m benchmarks serving --model runs/adapted          # tokens a second, time to the first and between
    python -m benchmarks serving --model runs/adapted --soak   # 200 clients for two minutes

The servers run at the same time and are asked in turns, so that what else the machine does disturbs all alike.
"""

import asyncio
import statistics
import tempfile
from contextlib import ExitStack
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import torch

from stablemask import strict_json
from stablemask.cli.main import run_with_options
from stablemask.data import load_tokenizer
from stablemask.errors import InputError
from stablemask.options import option

from ..environment import describe, save_json
from ..tables import table
from .clients import Told, load, prompts
from .servers import commands, running, without_mass
from .soak import soak


@dataclass(kw_only=True)
class ServingOptions:
    """Servers of one model under load: tokens a second, time to the first token and between tokens."""

    model: str = option(MISSING, "folder of a StableMask model")
    servers: list[str] = option(
        ["Transformers engine", "transformers serve"],
        "those to compare; also 'transformers serve, batched', 'vLLM, StableMask' and 'vLLM, softmax'",
    )
    vllm_python: str = option("python", "the Python that has vLLM and this package")
    clients: list[int] = option([], "so many at once; by default 1 4 16 64, of the soak 200")
    requests: int = option(2, "of each client, in a round")
    rounds: int = option(3, "in each, every server has its turn")
    lengths: list[int] = option([64, 128, 256, 512], "tokens of the prompts, drawn by chance")
    new_tokens: int = option(64, "of each answer")
    threads: int = option(1, "of each server, on a CPU")
    soak: bool = option(False, "hold one server under load instead, the first of --servers")
    seconds: float = option(120.0, "of the soak")
    save: Path | None = option(None, "JSON file of the result")


def main(argv: list[str]) -> int:
    return run_with_options(_run, argv, "python -m benchmarks serving", ServingOptions.__doc__)


def _run(options: ServingOptions) -> None:
    tokenizer = load_tokenizer(options.model)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (folder / "softmax").mkdir()
        softmax = without_mass(options.model, folder / "softmax")
        known = commands(options.model, softmax, options.vllm_python)
        if unknown := set(options.servers) - set(known):
            raise InputError(f"no server {unknown.pop()!r}; they are {', '.join(known)}")
        names = options.servers[:1] if options.soak else options.servers
        servers: dict[str, tuple[str, int, str]] = {}
        for name in names:
            command, model = known[name]
            server = running(command, folder / f"{len(servers)}.log", options.threads)
            servers[name] = (*stack.enter_context(server), model)
        result: dict[str, Any] = describe(torch.device("cpu")) | {"model": Path(options.model).name}
        if options.soak:
            ((url, pid, model),) = servers.values()
            texts = prompts(tokenizer, options.lengths, 64, 0)
            many = max(options.clients, default=200)
            told = asyncio.run(soak(url, pid, model, texts, many, options.seconds))
            result |= {"server": names[0], "soak": told}
            print(strict_json.dumps(told))
        else:
            result["rows"] = _compare(options, tokenizer, servers)
            print(_as_table(result["rows"], result["hardware"]))
    if options.save is not None:
        save_json(result, options.save)


def _compare(
    options: ServingOptions, tokenizer: Any, servers: dict[str, Any]
) -> list[dict[str, Any]]:
    told: dict[tuple[str, int], list[tuple[list[Told], float]]] = {}
    counts = options.clients or [1, 4, 16, 64]
    for round_number in range(options.rounds + 1):  # the first warms up
        for clients in counts if round_number else counts[:1]:
            texts = prompts(tokenizer, options.lengths, clients * options.requests, round_number)
            for name, (url, _, model) in servers.items():
                asked = {"model": model, "max_tokens": options.new_tokens, "temperature": 0}
                bodies = [{**asked, "prompt": text} for text in texts]
                answers = asyncio.run(load(url, bodies, clients))
                if round_number:
                    told.setdefault((name, clients), []).append(answers)
    return [_row(name, clients, rounds) for (name, clients), rounds in told.items()]


def _row(name: str, clients: int, rounds: list[tuple[list[Told], float]]) -> dict[str, Any]:
    speeds = [sum(told.tokens for told in answers) / seconds for answers, seconds in rounds]
    # Tokens may make no text, such as half of a letter, and one piece has nothing between.
    all_told = [told for answers, _ in rounds for told in answers if len(told.pieces) > 1]
    first = [told.pieces[0] for told in all_told]
    between = [(told.pieces[-1] - told.pieces[0]) / (told.tokens - 1) for told in all_told]
    return {
        "server": name,
        "clients": clients,
        "tokens_per_second": round(statistics.median(speeds), 2),
        "rounds": [round(speed, 2) for speed in speeds],
        "first": _median_and_95(first),
        "between": _median_and_95(between),
    }


def _median_and_95(seconds: list[float]) -> list[float]:
    values = torch.tensor(seconds or [float("nan")], dtype=torch.float64)
    return [round(values.quantile(share).item(), 4) for share in (0.5, 0.95)]


def _as_table(rows: list[dict[str, Any]], hardware: str) -> str:
    head = ["server", "clients", "tokens/s", "first token s", "95 %", "between ms", "95 %"]
    cells = [
        [row["server"], str(row["clients"]), f"{row['tokens_per_second']:.1f}"]
        + [f"{seconds:.2f}" for seconds in row["first"]]
        + [f"{1000 * seconds:.1f}" for seconds in row["between"]]
        for row in sorted(rows, key=lambda row: row["clients"])
    ]
    return f"{hardware}\n{table(head, cells)}"
