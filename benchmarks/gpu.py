"""Whether it is right and how fast it is on this machine's GPU, the most important first.

    python -m benchmarks gpu [PART ...] [--budget SECONDS] [--out FILE] [--resume]
    python -m benchmarks gpu page [FILE]        writes the GPU section of docs/benchmarks.md

Each part runs in a process of its own under a limit, and writes a line of JSON as soon as something is known: what
is cut off leaves what came before, and --resume goes on with the rest. It needs PyTorch, Transformers, Accelerate,
pytest and hypothesis, and no network; from a checkout it runs as it is, with PYTHONPATH=src.

Parts stand in ``gpu_parts.py``, the kernels' contract in ``gpu_contract.py``, the page in ``gpu_page.py``.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from stablemask import strict_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu.jsonl"
BUDGET = 500.0
LEAST = 25.0  # seconds, of which starting a process and a GPU takes the half
SAVING = 5.0  # seconds left over at the end
LIMITS = {  # seconds, by part, in this order
    "contract": 100,
    "tests": 130,
    "attention": 100,
    "decode": 60,
    "train-160m": 110,
    "masks": 90,
    "train-410m": 120,
    "train-160m-compiled": 240,
    "pair-160m": 240,
    "train-410m-compiled": 330,
    "flex": 240,
}
LOST = 75  # exit code of a part after which the GPU is of no more use to its process
NO_TIME, CUT_OFF = "no time left", "cut off"


class Results:
    """Lines of a file, one a fact; each names its ``part``, and the ``case`` of that part."""

    def __init__(self, path: Path, part: str) -> None:
        self._path, self._part = path, part

    def write(self, case: str, **facts: Any) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            line = strict_json.dumps({"part": self._part, "case": case, **facts})
            file.write(line + "\n")

    def of(self, part: str | None = None) -> list[dict[str, Any]]:
        return [row for row in read(self._path) if row["part"] == (part or self._part)]

    def know(self, case: str) -> bool:
        return any(row["case"] == case for row in self.of())


def read(path: Path) -> list[dict[str, Any]]:
    """The lines that are whole; the last one may have been cut off."""
    return list(_rows(path)) if path.exists() else []


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def run_parts(
    names: Sequence[str], path: Path, budget: float, command: Callable[[str, float], list[str]]
) -> None:
    """Run parts one after the other, none beyond its limit or the budget; what each came to is a line, too.

    Args:
        names: keys of :data:`LIMITS`; those that ended well before, by the file, are left out.
        path: of the results.
        budget: seconds for all.
        command: of a part that may take so many seconds.
    """
    results = Results(path, "parts")
    ended = {row["case"]: row["exit"] for row in results.of()}
    stop = time.monotonic() + budget - SAVING
    for name in (name for name in names if ended.get(name) != 0):
        begun = time.monotonic()
        code: int | str | None = None
        # A GPU that one case has lost to its process serves the next process again.
        while code in (None, LOST):
            left = min(LIMITS[name] + begun, stop) - time.monotonic()
            if left < LEAST:
                code = NO_TIME if code is None else CUT_OFF
                break
            code = _exit_code(command(name, left), left)
        seconds = round(time.monotonic() - begun, 1)
        results.write(name, exit=code, seconds=seconds)
        print(f"{name}: {'done' if code == 0 else code}, {seconds} s", flush=True)


def _exit_code(command: list[str], seconds: float) -> int | str:
    child = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return CUT_OFF
    finally:
        if child.poll() is None:  # with all that it has started
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def main(argv: Sequence[str]) -> None:
    if argv[:1] == ["page"]:
        from . import gpu_page

        gpu_page.main(argv[1:])
        return
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(LIMITS)}")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help="seconds (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="file (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with what --out has not yet")
    parser.add_argument("--here", type=float, help=argparse.SUPPRESS)  # a part, in this process
    options = parser.parse_args(argv)
    unknown = set(options.parts) - set(LIMITS)
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}; the parts are {', '.join(LIMITS)}")
    out = options.out.resolve()
    if options.here is not None:
        _run_here(options.parts[0], out, options.here)
        return
    if out.exists() and not options.resume:
        parser.error(f"{out} exists; go on with --resume, or name another file with --out")
    if not _has_gpu():
        parser.error("PyTorch sees no CUDA device here")

    def command(part: str, seconds: float) -> list[str]:
        here = ["-m", "benchmarks", "gpu", part, "--here", str(round(seconds)), "--out", str(out)]
        return [sys.executable, *here]

    run_parts(options.parts or list(LIMITS), out, options.budget, command)


def _has_gpu() -> bool:
    """Asked in a process that ends, so that this one holds no memory of the GPU."""
    ask = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", ask], check=False).returncode == 0


def _run_here(part: str, out: Path, seconds: float) -> None:
    from . import gpu_parts

    try:
        gpu_parts.PARTS[part](Results(out, part), gpu_parts.GPU, seconds)
    except gpu_parts.LostError as error:
        print(f"{part}: {error}", file=sys.stderr)
        sys.exit(LOST)
