"""``python -m benchmarks NAME ...``, from a clone."""

import importlib
import sys
from collections.abc import Callable, Sequence

from stablemask.cli.main import exit_code, run_with_options
from stablemask.errors import InputError

NAMES = {
    "attention": "by length, mask and backend, and others' too; 11 to 15 minutes",
    "training": "whole training loops, ours and others'; 5 to 11 minutes",
    "generation": "a Transformers model that generates; 11 minutes",
    "streaming": "loss by position from bounded caches",
    "serving": "servers of a model under load, side by side",
    "gpu": "is it right on this GPU, and how fast; 500 seconds",
}


def main(argv: Sequence[str] | None = None) -> int:
    return exit_code(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(argv: list[str]) -> int:
    name, *rest = argv or ["--help"]
    if name in ("-h", "--help"):
        print("usage: python -m benchmarks NAME [options]\n")
        print("\n".join(f"  {name:<11} {what}" for name, what in NAMES.items()))
        return 0
    if name not in NAMES:
        raise InputError(f"no benchmark {name!r}; they are {', '.join(NAMES)}")
    if name in ("streaming", "gpu", "serving"):
        importlib.import_module(f"benchmarks.{name}").main(rest)
        return 0
    # Here, for a GPU is asked before anything is imported that takes long or may not be installed.
    run: Callable = getattr(importlib.import_module("benchmarks.commands"), f"time_{name}")
    return run_with_options(run, rest, f"python -m benchmarks {name}", run.__doc__)


if __name__ == "__main__":
    sys.exit(main())
