"""The `stablemask` command: choose a command, run it, turn bad input into one line and exit 2."""

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from inspect import getdoc
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

from stablemask import __version__
from stablemask.cli import options as of
from stablemask.cli.parser import complete, parse_options
from stablemask.errors import InputError, RunError
from stablemask.options import did_you_mean
from stablemask.shell import pip_install
from stablemask.training.finetune_options import FinetuneOptions
from stablemask.training.pretrain_options import PretrainOptions
from stablemask.writing import BAD_PATH, FULL_DISK

# In the order a new user meets them. Each is run by the module of that name in this folder, which is
# imported once its options are read: PyTorch takes seconds.
COMMANDS: dict[str, type] = {
    "env": of.EnvOptions,
    "build": of.BuildOptions,
    "demo": of.DemoOptions,
    "pretrain": PretrainOptions,
    "finetune": FinetuneOptions,
    "merge": of.MergeOptions,
    "generate": of.GenerateOptions,
    "serve": of.ServeOptions,
    "evaluate": of.EvaluateOptions,
    "compare": of.CompareOptions,
    "inspect": of.InspectOptions,
    "export": of.ExportOptions,
    "bench": of.BenchOptions,
}

_PACKAGE = Path(__file__).parents[1]
_format_of_python = warnings.formatwarning

FAILED_RUN = 1
BAD_INPUT = 2
INTERRUPTED = 130
BROKEN_PIPE = 141  # as the shell reports a process that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code, see :func:`exit_code`."""
    return exit_code(lambda: _dispatch(list(sys.argv[1:] if argv is None else argv)))


def exit_code(command: Callable[[], int]) -> int:
    """Run a command, and where it fails say why in one line on stderr.

    0 success, 1 a run or a machine that could not go on, 2 bad input, 130 interrupted, 141 stdout closed.

    Any other exception is a bug and keeps its traceback.
    """
    _quieten_libraries()
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()  # here, where a closed pipe or a full disk can still be answered
    except (InputError, RunError) as error:
        return _fail(error, str(error), BAD_INPUT if isinstance(error, InputError) else FAILED_RUN)
    except KeyboardInterrupt:
        print("stablemask: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        _drop_stdout()
        return BROKEN_PIPE
    except Exception as error:
        fault = _fault_outside(error)
        if fault is None:
            raise
        _drop_stdout()
        return _fail(error, *fault)


def _dispatch(argv: list[str]) -> int:
    complete(COMMANDS)
    name, *rest = argv or [""]
    if name in COMMANDS:
        options: Any = parse_options(COMMANDS[name], rest, prog=f"stablemask {name}")
        return _import_command(name).run(options) or 0
    if name in ("-h", "--help"):
        print(_overview())
    elif name == "--version":
        print(f"stablemask {__version__}")
    elif not name:
        raise InputError("no command given; see `stablemask --help`")
    else:
        advice = did_you_mean(name, COMMANDS) or f"the commands are {', '.join(COMMANDS)}"
        raise InputError(f"no command {name!r}; {advice}")
    return 0


def run_with_options(
    run: Callable[[Any], int | None], argv: Sequence[str], prog: str, description: str | None
) -> int:
    """Call a function of one argument, ``options``, a dataclass of options, which is read from ``argv``."""
    options = parse_options(
        get_type_hints(run)["options"], argv, prog=prog, description=description
    )
    return run(options) or 0


def _import_command(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"stablemask.cli.{name}")
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "stablemask"):
            raise
        extra = "serve" if name == "serve" else "all"
        raise InputError(f"{name} needs the package {package!r}: {pip_install(extra)}") from error


def _quieten_libraries() -> None:
    """No hints to programmers, and bars on a terminal only; what the user has set stays."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # PEFT and Transformers import torchao where it is installed, with what it has for other machines.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.formatwarning = _format_warning


def _format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """One of ours is a line like an error's, of the main process alone; others stay as they are."""
    if not Path(filename).is_relative_to(_PACKAGE):
        return _format_of_python(message, category, filename, lineno, line)
    return f"stablemask: {message}\n" if os.environ.get("RANK", "0") == "0" else ""


def _overview() -> str:
    commands = [
        f"  {name:<10} {(getdoc(options) or '').splitlines()[0]}"
        for name, options in COMMANDS.items()
    ]
    return "\n".join(
        [
            "usage: stablemask COMMAND [options]",
            "",
            "Attention with a pseudo mass, and the tools to train language models with it.",
            "",
            "commands:",
            *commands,
            "",
            "`stablemask COMMAND --help` lists the options of a command; every one of them can",
            "also stand in a YAML file given with --config.",
        ]
    )


def _fault_outside(error: BaseException) -> tuple[str, int] | None:
    """A line and an exit code for a full disk or a bad path, None for what can only be a bug."""
    cause: BaseException | None = error
    while cause is not None:
        number, file = getattr(cause, "errno", None), getattr(cause, "filename", None)
        # safetensors writes in Rust and keeps only the text of the system's error.
        if number in FULL_DISK or "No space left on device" in str(cause):
            where = f" for {file}" if file else ""
            return f"no space left on the disk{where}; free some and run again", FAILED_RUN
        if isinstance(cause, PermissionError):
            return f"no permission for {file or 'this operation'}; {cause.strerror}", BAD_INPUT
        if isinstance(cause, OSError) and number in BAD_PATH and file:
            return f"cannot use {file}: {cause.strerror}; name another path", BAD_INPUT
        cause = cause.__cause__ or cause.__context__
    return None


def _fail(error: BaseException, message: str, code: int) -> int:
    # One of several processes need not repeat what the main one says.
    if not getattr(error, "told_by_main", False):
        print("stablemask: error:", " ".join(message.split()), file=sys.stderr)
    return code


def _drop_stdout() -> None:
    """Nobody can read stdout any more: keep the interpreter from failing to flush it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
