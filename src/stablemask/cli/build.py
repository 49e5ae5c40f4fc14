"""Compile what the CPU does in C++, for the PyTorch and Python installed; it needs a C++ compiler.

A cached step of one token then takes about half of stock SDPA's time, and so do sequences on processors with
AVX-512, trained too. Results are the same to rounding. Run it again after an update of PyTorch or of this package.
"""

from dataclasses import dataclass

import torch

from stablemask import native

SUMMARY = "compile what the CPU does in C++: short sequences, and decoding"


@dataclass(kw_only=True)
class BuildOptions:
    pass


def run(options: BuildOptions) -> None:
    path = native.library_path()
    if native.load() is not None:
        print(f"{path} is compiled already")
        return
    print(f"compiling library.cpp for PyTorch {torch.__version__}, some seconds", flush=True)
    print(native.build())
