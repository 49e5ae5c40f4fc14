"""The library in C++: compiled once, found by the next process, and one line where it cannot be compiled."""

import shutil

import pytest
import torch

from stablemask import native
from stablemask.cli.main import BAD_INPUT, main


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the sources, where nothing is compiled yet."""
    for name in native._SOURCES:
        shutil.copy(native.FOLDER / name, tmp_path)
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    return tmp_path


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_it_is_compiled_once(folder, capsys):
    assert native.language() == "Python"
    assert main(["build"]) == 0
    assert native.library_path().exists()
    assert sorted(path.suffix for path in folder.iterdir()) == [".cpp", ".h", ".h", ".py", ".so"]
    assert native.language() == "C++"
    assert main(["build"]) == 0
    assert "compiled already" in capsys.readouterr().out


def test_a_compiler_that_fails_is_one_line(folder, capsys):
    (folder / "library.cpp").write_text("int main() { return nothing; }\n")
    assert main(["build"]) == BAD_INPUT
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "does not compile" in error
    assert not list(folder.glob("_native*"))


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
def test_what_does_not_load_is_one_line(folder, capsys):
    (folder / "library.cpp").write_text("int missing(); int present = missing();\n")
    assert main(["build"]) == BAD_INPUT
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "does not load" in error
    assert not list(folder.glob("_native*"))


def test_an_old_processor_is_one_line(folder, monkeypatch, capsys):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert main(["build"]) == BAD_INPUT
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "AVX2" in error


def test_no_compiler_is_one_line(folder, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CC", "no-such-compiler")
    assert main(["build"]) == BAD_INPUT
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no-such-compiler" in error


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
    for name in ("library.cpp", "row.h", "sink.h"):
        with (folder / name).open("a") as source:
            source.write("// new\n")
        after = native.library_path()
        assert after != before
        before = after
