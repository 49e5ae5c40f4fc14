"""What the CPU does in C++, compiled where it is used.

A sequence that attends to itself, with gradients (``causal.h``), by tiles (``tiles.h``) or by PyTorch's kernel and
what a sink takes of its output (``sink.h``); a row of decoding (``row.h``); what a call must be for it
(``plain.h``), and what Python calls (``library.cpp``).

A compiled library fits one PyTorch, one Python and one kind of processor, so none is shipped: ``stablemask
build`` compiles ``library.cpp`` beside its source, and the next process finds it there. Without it the same
is computed from Python, by PyTorch's own kernels.
"""

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..errors import InputError

FOLDER = Path(__file__).parent
_NAME = "_native"
_SOURCES = ("library.cpp", "plain.h", "row.h", "causal.h", "tiles.h", "sink.h", "setup.py")


def library_path() -> Path:
    """Where the library for this source, PyTorch, Python and processor is, or would be."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update((FOLDER / name).read_bytes())
    digest.update(f"{torch.__version__} {torch.backends.cpu.get_cpu_capability()}".encode())
    return FOLDER / f"{_NAME}-{digest.hexdigest()[:12]}{EXTENSION_SUFFIXES[0]}"


def load() -> ModuleType | None:
    """The library, or None where it was not compiled or does not load."""
    path = library_path()
    try:
        return _import(path) if path.exists() else None
    except ImportError:
        return None


def language() -> str:
    """What plain calls run in, in processes that start now."""
    return "Python" if load() is None else "C++"


def build() -> Path:
    """Compile the library and put it in its place.

    Raises:
        InputError: the processor is too old to gain by it, there is no working C++ compiler with OpenMP,
            what it makes cannot be loaded, or the package's folder cannot be written.
    """
    path = library_path()
    if (
        platform.machine() in ("x86_64", "AMD64")
        and torch.backends.cpu.get_cpu_capability() == "DEFAULT"
    ):
        raise InputError(
            "this processor has no AVX2, without which PyTorch's own kernels are faster"
        )
    if not os.access(FOLDER, os.W_OK):
        raise InputError(f"{FOLDER} cannot be written; run `stablemask build` as its owner")
    with tempfile.TemporaryDirectory() as work:
        for name in _SOURCES:
            shutil.copy(FOLDER / name, work)
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
        built = next(Path(work).glob(f"{_NAME}.*"), None)
        if done.returncode or built is None:
            raise InputError(f"library.cpp does not compile here: {_reason(done.stderr)}")
        try:
            _import(built)
        except ImportError as error:
            raise InputError(f"what library.cpp compiles to does not load here: {error}") from error
        staged = path.with_suffix(f".{os.getpid()}")
        shutil.copy(built, staged)
        os.replace(staged, path)
    return path


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_NAME, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a library")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _reason(output: str) -> str:
    """The first line of a compiler's output that names an error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if re.search(r"\berror: ", line)), "".join(lines[-1:]))


LIBRARY: Any = load()
"""The library of this process, if there is one."""
