"""The library in C++: compiled once, found by the next process, run only if it is ours, and one line where it
cannot be compiled."""

import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from stablemask.backends import native
from stablemask.cli.main import BAD_INPUT, main
from tests import marks

EMPTY = "int nothing;\n"


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of the sources but for what is long in them, and a folder of extensions where nothing is yet."""
    (tmp_path / "sources").mkdir()
    for name in native._FILES:
        shutil.copy(native.SOURCES / name, tmp_path / "sources")
    (tmp_path / "sources/library.cpp").write_text(EMPTY)
    monkeypatch.setattr(native, "SOURCES", tmp_path / "sources")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    # What is compiled of these cannot be timed, nor follow.
    monkeypatch.setattr(native, "LIBRARY", None)
    monkeypatch.setattr(native, "set_rules", lambda rules: None)
    monkeypatch.setattr(native.tuning, "measure", lambda attend, follow: [])
    return tmp_path / "sources"


def kept():
    """What a build left, but for its lock."""
    return {path.name for path in native.library_path().parent.glob("*")} - {".lock"}


def build_error(capsys):
    """The one line of a build that fails and leaves nothing behind."""
    before = kept()
    assert main(["build"]) == BAD_INPUT
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert kept() == before
    assert native.load() is None
    return error


@marks.compiler
def test_these_tests_run_in_cpp():
    assert native.LIBRARY is not None, "compile it first: stablemask build"


@marks.compiler
def test_it_is_compiled_once_where_extensions_are_kept(sources, tmp_path, monkeypatch, capsys):
    path = native.library_path()
    assert path.parent == tmp_path / "extensions/stablemask"
    assert native.load() is None
    assert main(["build"]) == 0
    assert "compiling" in capsys.readouterr().out
    assert native.load() == path
    assert kept() == {path.name, native.rules_path().name}
    assert {file.name for file in sources.iterdir()} == set(native._FILES)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["build"]) == 0
    assert "compiling" not in capsys.readouterr().out


@marks.compiler
def test_two_builds_at_once_compile_once(sources, tmp_path, monkeypatch):
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexec c++ "$@"\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda _: native.build(), range(2))) == [native.library_path()] * 2
    compiled = [call for call in (tmp_path / "calls").read_text().splitlines() if " -c " in call]
    assert len(compiled) == 1
    assert native.load() is not None


@marks.compiler
def test_what_killed_builds_left_stops_no_other(sources):
    path = native.library_path()
    killed = path.parent / "unfinished-1"
    killed.mkdir(parents=True)
    (killed / "lock").touch()  # PyTorch's own, on which it would wait without end
    (killed / "_native.so").write_bytes(b"half")
    path.write_bytes(b"not a library")
    assert native.load() is None
    native.build()
    assert native.load() is not None
    assert kept() == {path.name}


@marks.compiler
def test_what_others_can_write_is_not_run(sources, monkeypatch, capsys):
    before = os.umask(0)
    try:
        path = native.build()
    finally:
        os.umask(before)
    assert native.load() is not None
    for loosened in (path, path.parent):
        for writer in (stat.S_IWGRP, stat.S_IWOTH):
            loosened.chmod(0o700 | writer)
            assert native.load() is None
        if loosened is path:
            loosened.chmod(0o700)
    assert "others than you can write" in build_error(capsys)
    path.parent.chmod(0o700)
    os.chown(path, 12345, -1) if os.geteuid() == 0 else monkeypatch.setattr(os, "geteuid", int)
    assert native.load() is None


def test_an_error_in_the_source_is_one_line(sources, capsys):
    (sources / "library.cpp").write_text("int main() { return nothing; }\n")
    assert "does not compile" in build_error(capsys)


@marks.compiler
def test_what_does_not_load_is_one_line(sources, capsys):
    (sources / "library.cpp").write_text("int missing(); int present = missing();\n")
    assert "does not load here: " in (error := build_error(capsys))
    assert "missing" in error


def test_an_old_processor_is_one_line(sources, monkeypatch, capsys):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "AVX2" in build_error(capsys)


def test_no_compiler_is_one_line(sources, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler --fast")
    assert "no 'no-such-compiler' here" in build_error(capsys)


def test_no_ninja_is_one_line(sources, tmp_path, monkeypatch, capsys):
    (tmp_path / "c++").write_text("")
    (tmp_path / "c++").chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert "no 'ninja' here" in build_error(capsys)
    assert os.environ["PATH"] == str(tmp_path)


def test_a_missing_package_is_one_line(sources, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "filelock", None)
    assert "takes the package 'filelock'" in build_error(capsys)


def test_a_home_that_cannot_be_written_is_one_line(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    assert str(native.library_path()).startswith(f"{tmp_path}/file/.cache/torch_extensions/")
    assert "$TORCH_EXTENSIONS_DIR" in build_error(capsys)


def test_another_source_pytorch_or_processor_is_another_library(sources, monkeypatch):
    before = native.library_path()
    with monkeypatch.context() as other:
        other.setattr(torch, "__version__", "9.9.9")
        assert native.library_path() != before
    with monkeypatch.context() as other:
        other.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        assert native.library_path() != before
        assert "-AVX2-" in native.library_path().name
        assert not any("avx512" in flag.lower() for flag in native._flags())
    for name in ("library.cpp", "causal.h", "sink.h"):
        with (sources / name).open("a") as source:
            source.write("// new\n")
        after = native.library_path()
        assert after != before
        before = after


@marks.nightly
@marks.avx512
@marks.compiler
def test_on_a_processor_without_avx512(tmp_path):
    """PyTorch is told that this is one: vectors are half as long."""
    narrow = {"ATEN_CPU_CAPABILITY": "avx2", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    for command in (
        ["-c", "from stablemask.backends import native; native.build()"],
        ["-m", "pytest", "-q", "tests/vllm/test_paged.py", "tests/test_causal.py"],
    ):
        environment = {**os.environ, **narrow, "HYPOTHESIS_PROFILE": "test"}
        subprocess.run([sys.executable, *command], env=environment, check=True)
