"""Compiles decode.cpp; ``stablemask build`` runs this file."""

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

setup(
    name="stablemask-native",
    ext_modules=[CppExtension("_decode", ["decode.cpp"], extra_compile_args=["-O3", "-g0"])],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=False)},
)
