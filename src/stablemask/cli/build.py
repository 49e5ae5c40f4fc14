"""Compile what the CPU does in C++."""

import torch

from stablemask import native
from stablemask.cli.options import BuildOptions


def run(options: BuildOptions) -> None:
    path = native.library_path()
    if native.load() is not None:
        print(f"{path} is compiled already")
        return
    print(f"compiling library.cpp for PyTorch {torch.__version__}, some seconds", flush=True)
    print(native.build())
