"""The servers that are compared, each a process of its own."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import ProxyHandler, build_opener

from stablemask.errors import InputError, RunError

START = 600  # seconds that a server may take until it answers


def commands(model: str, softmax: str, vllm_python: str) -> dict[str, tuple[list[str], str]]:
    """How each is started, less its port, and what it calls its model; ``softmax`` is the one without a mass.

    `transformers serve` is a reference with that one: it takes no model with a mass.
    """

    def ours(python: str, engine: str, served: str) -> tuple[list[str], str]:
        start = [python, "-m", "stablemask", "serve", "--engine", engine, "--dtype", "float32"]
        return [*start, "--model", served], served

    theirs = [str(Path(sys.executable).with_name("transformers")), "serve", softmax]
    theirs += ["--host", "127.0.0.1", "--dtype", "float32"]
    # Its cache would else take nine tenths of the memory; this is what 64 clients need.
    batched = ["--continuous-batching", "--cb-num-blocks", "192", "--cb-max-batch-tokens", "512"]
    return {
        "vLLM, StableMask": ours(vllm_python, "vllm", model),
        "vLLM, softmax": ours(vllm_python, "vllm", softmax),
        "Transformers engine": ours(sys.executable, "transformers", model),
        "transformers serve": (theirs, softmax),
        "transformers serve, batched": ([*theirs, *batched], softmax),
    }


def without_mass(model: str, folder: Path) -> str:
    """A copy of a model's folder whose configuration asks for no StableMask."""
    source = Path(model)
    if not (source / "config.json").is_file():
        raise InputError(f"--model must be the folder of a model, got {model!r}")
    for file in source.iterdir():
        if file.is_file() and file.name != "config.json":
            (folder / file.name).symlink_to(file.resolve())
    config = json.loads((source / "config.json").read_text())
    config.pop("stablemask", None)
    if "attention" in config:  # our own decoder
        config["attention"] = "softmax"
    else:  # what has others refuse a model that asks for a mass
        config.pop("attn_implementation", None)
        config["architectures"] = [
            name.removeprefix("StableMask") for name in config["architectures"]
        ]
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@contextmanager
def running(command: list[str], log: Path, threads: int) -> Iterator[tuple[str, int]]:
    """The URL of a server that answers, and the id of its process."""
    if shutil.which(command[0]) is None:
        raise InputError(f"there is no {command[0]}")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "VLLM_CPU_KVCACHE_SPACE": "2"}
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            end = time.monotonic() + START
            while not _answers(f"{url}/health"):
                if server.poll() is not None or time.monotonic() > end:
                    last = (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
                    raise RunError(f"{' '.join(command[:4])} does not answer: {last}")
                time.sleep(0.5)
            yield f"{url}/v1", server.pid
        finally:
            server.terminate()  # what runs in the background may ignore Ctrl-C
            try:
                server.wait(60)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(server.pid, signal.SIGKILL)
                server.wait()


def _answers(url: str) -> bool:
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=2):
            return True
    except OSError:
        return False


def resident_mib(pid: int) -> float:
    """Memory of a process and of all that it started."""
    parents: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The name of a program, in parentheses, may hold spaces.
            parents.setdefault(int(status.read_text().rpartition(")")[2].split()[1]), []).append(
                int(status.parent.name)
            )
    pages, waiting = 0, [pid]
    while waiting:
        process = waiting.pop()
        waiting += parents.get(process, [])
        with suppress(OSError):
            pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
