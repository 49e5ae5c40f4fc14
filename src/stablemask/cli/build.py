"""Compile what the CPU does in C++, and time it."""

import torch

from stablemask.backends import native
from stablemask.backends.native import tuning
from stablemask.backends.stock import operators  # noqa: F401  which the library calls
from stablemask.cli.options import BuildOptions


def run(options: BuildOptions) -> None:
    if native.load() is None:
        print(f"compiling library.cpp for PyTorch {torch.__version__}, some seconds", flush=True)
    print(native.build())
    if tuning.read(native.rules_path()) is None:
        print("timing it on this processor, some 20 seconds", flush=True)
    for dtype, rule in tuning.in_words(native.tune()).items():
        print(f"{dtype:<9} {rule}")
    print(native.rules_path())
