"""The library in C++: compiled once, found by the next process, and one line where it cannot be compiled."""

import shutil

import pytest
import torch

from stablemask import native
from stablemask.cli.main import BAD_INPUT, main

EMPTY = """
#include <Python.h>
static PyModuleDef empty = {PyModuleDef_HEAD_INIT, "_native"};
PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&empty); }
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the sources, where nothing is compiled yet."""
    for name in native._SOURCES:
        shutil.copy(native.FOLDER / name, tmp_path)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    return tmp_path


def build_error(folder, capsys):
    """The one line of a build that fails and leaves nothing behind."""
    assert main(["build"]) == BAD_INPUT
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not list(folder.glob("_native*"))
    return error


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_these_tests_run_in_cpp():
    assert native.LIBRARY is not None, "compile it first: stablemask build"


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_it_is_compiled_once(folder, capsys):
    (folder / "library.cpp").write_text(EMPTY)
    assert native.language() == "Python"
    assert main(["build"]) == 0
    assert native.library_path().exists()
    left = {path.name for path in folder.iterdir()} - {native.library_path().name}
    assert left == set(native._SOURCES)
    assert native.language() == "C++"
    assert main(["build"]) == 0
    assert "compiled already" in capsys.readouterr().out


def test_a_compiler_that_fails_is_one_line(folder, capsys):
    (folder / "library.cpp").write_text("int main() { return nothing; }\n")
    assert "does not compile" in build_error(folder, capsys)


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_what_does_not_load_is_one_line(folder, capsys):
    (folder / "library.cpp").write_text("int missing(); int present = missing();\n")
    assert "does not load" in build_error(folder, capsys)


def test_an_old_processor_is_one_line(folder, monkeypatch, capsys):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "AVX2" in build_error(folder, capsys)


def test_no_compiler_is_one_line(folder, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CC", "no-such-compiler")
    assert "no-such-compiler" in build_error(folder, capsys)


def test_a_library_that_does_not_load_is_none(folder):
    native.library_path().write_bytes(b"not a library")
    assert native.load() is None


def test_another_source_pytorch_or_processor_is_another_library(folder, monkeypatch):
    before = native.library_path()
    with monkeypatch.context() as other:
        other.setattr(torch, "__version__", "9.9.9")
        assert native.library_path() != before
    with monkeypatch.context() as other:
        other.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "Z80")
        assert native.library_path() != before
    for name in ("library.cpp", "causal.h", "sink.h"):
        with (folder / name).open("a") as source:
            source.write("// new\n")
        after = native.library_path()
        assert after != before
        before = after
