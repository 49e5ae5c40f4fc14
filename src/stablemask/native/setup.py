"""Compiles library.cpp; ``stablemask build`` runs this file."""

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

# As PyTorch compiles its own kernels for what this processor can do.
VECTORS = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}
found = torch.backends.cpu.get_cpu_capability()
capability = found if found in VECTORS else "DEFAULT"
macros = [f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]

setup(
    name="stablemask-native",
    ext_modules=[
        CppExtension(
            "_native",
            ["library.cpp"],
            extra_compile_args=["-O3", "-g0", "-fopenmp", *macros, *VECTORS.get(capability, [])],
            extra_link_args=["-fopenmp"],
        )
    ],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=False)},
)
