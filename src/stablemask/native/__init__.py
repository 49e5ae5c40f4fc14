"""The decode step in C++, compiled where it is used.

A compiled library fits one PyTorch, one Python and one kind of processor, so none is shipped: ``stablemask
build`` compiles ``decode.cpp`` beside its source, and the next process finds it there. Without it the same
step runs in Python, by PyTorch's own kernel.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

from ..errors import InputError

FOLDER = Path(__file__).parent
_NAME = "_decode"
_SOURCES = ("decode.cpp", "row.h", "setup.py")


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
    spec = importlib.util.spec_from_file_location(_NAME, path)
    if not path.exists() or spec is None or spec.loader is None:
        return None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError:
        return None
    return module


def language() -> str:
    """What decode steps run in, in this process and those that start now."""
    return "Python" if load() is None else "C++"


def build() -> Path:
    """Compile the library and put it in its place.

    Raises:
        InputError: there is no working C++ compiler, or the package's folder cannot be written.
    """
    path = library_path()
    if not os.access(FOLDER, os.W_OK):
        raise InputError(f"{FOLDER} cannot be written; run `stablemask build` as its owner")
    with tempfile.TemporaryDirectory() as work:
        for name in _SOURCES:
            shutil.copy(FOLDER / name, work)
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
        built = next(Path(work).glob(f"{_NAME}.*"), None)
        if done.returncode or built is None:
            raise InputError(f"decode.cpp does not compile here: {_reason(done.stderr)}")
        staged = path.with_suffix(f".{os.getpid()}")
        shutil.copy(built, staged)
        os.replace(staged, path)
    return path


def _reason(output: str) -> str:
    """The first line of a compiler's output that names an error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), "".join(lines[-1:]))
