"""What the CPU does in C++, compiled where it is used.

A sequence that attends to itself, with gradients (``causal.h``), by tiles (``tiles.h``) or by PyTorch's kernel and
what a sink takes of its output (``sink.h``); a row of decoding (``row.h``); a server's paged cache (``paged.h``);
and the operators that PyTorch knows them by (``library.cpp``), which ``backend.py`` calls, and ``stablemask.vllm``.

A compiled library fits one PyTorch, one Python and one kind of processor, so none is shipped: ``stablemask
build`` compiles ``library.cpp``, with PyTorch's own tools, into the folder where PyTorch keeps extensions, and
the next process finds it there. Without it the same is computed from Python, by PyTorch's own kernels.
"""

import hashlib
import os
import platform
import re
import shlex
import shutil
import stat
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import InputError
from ...shell import pip_install
from ...writing import FULL_DISK
from . import tuning
from .tuning import Rules

SOURCES = Path(__file__).parent
_NAME = "_native"
_FILES = ("library.cpp", "row.h", "rules.h", "causal.h", "tiles.h", "sink.h", "paged.h")

_BUSY = 1.3  # times what is computed that the clock runs

# As PyTorch compiles its own kernels for what this processor can do.
_VECTORS = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}


def library_path() -> Path:
    """Where the library for this source, PyTorch, Python and processor is, or would be."""
    capability = torch.backends.cpu.get_cpu_capability()
    digest = hashlib.sha256(" ".join(_flags()).encode())
    for name in _FILES:
        digest.update((SOURCES / name).read_bytes())
    kept = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.expanduser("~/.cache/torch_extensions")
    name = f"torch{torch.__version__}-{capability.replace(' ', '_')}-{digest.hexdigest()[:12]}"
    return Path(kept, "stablemask", name + EXTENSION_SUFFIXES[0]).absolute()


def load() -> Path | None:
    """Have PyTorch know the library's operators.

    Returns:
        Its path, or None where it was not compiled, does not load, or others could have put it there.
    """
    path = library_path()
    try:
        if _is_ours(path.parent) and _is_ours(path):
            torch.ops.load_library(path)
            return path
    except OSError:
        pass
    return None


def build() -> Path:
    """Compile the library and put it in its place, unless it is there.

    Raises:
        InputError: the processor is too old to gain by it, ninja or a working C++ compiler with OpenMP is
            missing, what it makes cannot be loaded, or there is no folder of the user's own to keep it in.
    """
    path = library_path()
    if (
        platform.machine() in ("x86_64", "AMD64")
        and torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    ):
        raise InputError(
            "this processor has no AVX2, without which PyTorch's own kernels are faster"
        )
    with _folder_of(path) as folder:
        if load() is None:  # another process may have been waited for
            for killed in folder.glob("unfinished-*"):
                shutil.rmtree(killed, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix="unfinished-") as work:
                os.replace(_compile(work), path)
    return path


def rules_path() -> Path:
    """Where the rules of the library and this processor are, or would be."""
    return tuning.path_beside(library_path())


def tune() -> Rules:
    """Time where each way is the fastest, keep it beside the library, and follow it, unless it is there.

    Raises:
        InputError: there is no folder of the user's own to keep it in.
    """
    global LIBRARY
    LIBRARY = LIBRARY or load()  # which this process may have compiled
    path = rules_path()
    with _folder_of(path):
        rules = tuning.read(path)
        if rules is None:
            timings = list(tuning.measure(_attend, set_rules))
            reached = bool(timings) and timings[-1].rows == max(tuning.LENGTHS)
            if timings and not (reached and tuning.delay(timings) < _BUSY):
                warnings.warn(
                    f"the machine was busy: when it is quiet other ways may be faster; delete '{path}' then, "
                    "and run `stablemask build` again",
                    stacklevel=2,
                )
            rules = tuning.decide(timings)
            tuning.write(rules, path)
    set_rules(rules)
    return rules


def in_use() -> dict[str, Any]:
    """What this process computes attention by on the CPU, for the record of a run."""
    return {
        "library": None if LIBRARY is None else LIBRARY.name,
        "rules": tuning.digest(RULES),
        "in_words": tuning.in_words(RULES),
    }


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scale = query.shape[-1] ** -0.5
    out, _ = torch.ops.stablemask.native_forward(
        query, key, value, torch.zeros(1, 1, 1), None, scale
    )
    return out


@contextmanager
def _folder_of(path: Path) -> Iterator[Path]:
    """The folder of a file that is to be written, which is the user's own, for this process alone."""
    try:
        from filelock import FileLock

        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(path.parent):
            raise InputError(
                f"others than you can write to '{path.parent}', and what is there is run; "
                "name another folder by $TORCH_EXTENSIONS_DIR"
            )
        with FileLock(path.parent / ".lock"):
            yield path.parent
    except ModuleNotFoundError as error:
        raise InputError(
            f"compiling takes the package {error.name!r}: {pip_install('build')}"
        ) from error
    except OSError as error:
        if error.errno in FULL_DISK:
            raise
        raise InputError(
            f"cannot keep the library in '{path.parent}': {error.strerror or error}; "
            "name another folder by $TORCH_EXTENSIONS_DIR"
        ) from error


def _compile(work: str) -> Path:
    """The library, in the empty folder ``work``, whole on the disk and writable by nobody else."""
    from torch.utils import cpp_extension  # which imports setuptools, in older versions

    before = os.environ.get("PATH", os.defpath)
    # An environment's programs, ninja among them, are found without activating it too.
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), before])
    try:
        for program in (*shlex.split(os.environ.get("CXX", "c++"))[:1], "ninja"):
            if shutil.which(program) is None:
                raise InputError(f"compiling takes a C++ compiler and ninja: no '{program}' here")
        cpp_extension.load(
            _NAME,
            str(SOURCES / "library.cpp"),
            extra_cflags=_flags(),
            extra_ldflags=["-fopenmp"],
            build_directory=work,
            is_python_module=False,
        )
    except RuntimeError as error:
        raise InputError(f"library.cpp does not compile here: {_reason(str(error))}") from error
    except OSError as error:
        reason = error.__cause__ or error
        raise InputError(f"what library.cpp compiles to does not load here: {reason}") from error
    finally:
        os.environ["PATH"] = before
    built = next(Path(work).glob("*.so"))
    with built.open("rb+") as file:
        os.fchmod(file.fileno(), 0o700)
        os.fsync(file.fileno())
    return built


def _flags() -> list[str]:
    found = torch.backends.cpu.get_cpu_capability()
    capability = found if found in _VECTORS else "DEFAULT"
    macros = ["-DNDEBUG", f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
    return ["-O3", "-g0", "-fopenmp", *macros, *_VECTORS.get(capability, ())]


def _is_ours(path: Path) -> bool:
    """Whether nobody but this user, and root, may write there."""
    status = path.stat()
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _reason(output: str) -> str:
    """The first line of a compiler's output that names an error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if re.search(r"\berror: ", line)), "".join(lines[-1:]))


def set_rules(rules: Rules) -> None:
    """Have this process, and its library, follow them."""
    global RULES
    RULES = rules
    if LIBRARY is not None:
        torch.ops.stablemask.native_rules(tuning.as_numbers(rules))


LIBRARY = load()
"""The library of this process, if there is one."""

RULES: Rules
"""Where this process takes which way: nowhere another than the stock kernel's, where nothing was timed."""

set_rules((LIBRARY is not None and tuning.read(rules_path())) or {})
