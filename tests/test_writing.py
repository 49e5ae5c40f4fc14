"""One writer at a time, and places that cannot be written to."""

import contextlib
import errno
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from stablemask.cli.main import main
from stablemask.cli.options import BenchOptions
from stablemask.errors import InputError
from stablemask.options import save_yaml
from stablemask.writing import only_writer, whole_file, write_whole, writing

# Holds the folder, with a child that outlives it, as the processes that load data do for a while.
HOLDER = """
import os, sys, time
from pathlib import Path
from stablemask.writing import only_writer
with only_writer(Path(sys.argv[1])):
    if not os.fork():
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_the_lock_is_anothers_and_goes_with_it(tmp_path):
    folder = tmp_path / "runs" / "first"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(InputError, match=r"another process is writing to .*first"):
                only_writer(folder).__enter__()
            holder.kill()
            holder.wait()
            with only_writer(folder):
                assert os.listdir(folder) == [".lock"]
        finally:
            holder.kill()
            os.kill(child, 9)
    assert os.listdir(folder) == []


def test_what_stays_empty_is_removed(tmp_path):
    with only_writer(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert os.listdir(tmp_path) == []
    with only_writer(tmp_path / "a" / "answers.jsonl", is_file=True):
        with pytest.raises(InputError, match="another process"):
            only_writer(tmp_path / "a" / "answers.jsonl", is_file=True).__enter__()
        (tmp_path / "a" / "answers.jsonl").write_text("{}")
    assert os.listdir(tmp_path / "a") == ["answers.jsonl"]


def test_places_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for place, reason in {
        "file": "it is no folder",
        "loop": "it is no folder",
        "file/run": "Not a directory",
        "loop/run": "Too many levels of symbolic links",
        "n" * 300: "File name too long",
    }.items():
        with pytest.raises(
            InputError, match=rf"cannot write to '.*': {reason}; name another --out"
        ):
            only_writer(tmp_path / place).__enter__()


def test_only_a_bad_path_is_the_users_fault():
    with pytest.raises(InputError, match="'out': Read-only file system"), writing(Path("out")):
        raise OSError(errno.EROFS, "Read-only file system", "out/model")
    with pytest.raises(InputError, match="'out': No such file"), writing(Path("out")):
        raise OSError(errno.ENOENT, "No such file or directory", "out/model")  # as /proc has it
    with pytest.raises(OSError), writing(Path("out")):
        raise OSError(errno.ENOSPC, "No space left on device", "out/model")


def test_generating_holds_what_it_writes_to(tmp_path, capsys):
    out = tmp_path / "out"
    words = ["--model", "none", "--prompts", "none.txt", "--out", str(out), "--resume"]
    with only_writer(out, is_file=True):
        assert main(["generate", *words]) == 2
    assert "another process is writing to" in capsys.readouterr().err


def to_page(path):
    with whole_file(path) as partial:
        partial.write_text("<html>" * 1000)


WRITERS = {
    "text": lambda path: write_whole(path, "é" * 1000),
    "options": lambda path: save_yaml(BenchOptions(lengths=[7] * 1000), path),
    "page": to_page,
}


@contextlib.contextmanager
def full_disk():
    """Files that this process writes end after ten bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_leaves_the_old_file_or_none(write, tmp_path):
    path = tmp_path / "kept"
    with full_disk(), pytest.raises(OSError, match="File too large"):
        write(path)
    assert os.listdir(tmp_path) == []
    path.write_text("old")
    with full_disk(), pytest.raises(OSError, match="File too large"):
        write(path)
    assert os.listdir(tmp_path) == ["kept"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_kill_leaves_the_old_file(write, tmp_path, monkeypatch):
    path = tmp_path / "kept.txt"
    path.write_text("old")
    seen = []

    def last_moment(partial, final):
        # All is written, and a kill now would leave this beside the old file, hidden.
        hidden = partial.relative_to(tmp_path).parts[0].startswith(".")
        seen.append((path.read_text(), hidden, partial.name, partial.stat().st_size > 1000))

    monkeypatch.setattr(os, "replace", last_moment)
    write(path)
    assert seen == [("old", True, "kept.txt", True)]


def test_what_is_written_beside_a_file_comes_with_it_and_before_it(tmp_path, monkeypatch):
    moved, replace = [], os.replace
    monkeypatch.setattr(
        os, "replace", lambda *paths: (moved.append(paths[1].name), replace(*paths))
    )
    with whole_file(tmp_path / "graph") as partial:
        partial.write_text("")
        for name in ("a", "z"):
            partial.with_name(name).write_text("")
        assert [path.name[0] for path in tmp_path.iterdir()] == ["."]
    assert sorted(moved) == sorted(os.listdir(tmp_path)) == ["a", "graph", "z"]
    assert moved[-1] == "graph"


def test_what_is_no_ordinary_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, kind in {"pipe": "no ordinary file", "folder": "a folder"}.items():
        with pytest.raises(InputError, match=f"cannot write .*{name}: it is {kind}"):
            whole_file(tmp_path / name).__enter__()
    assert sorted(os.listdir(tmp_path)) == ["folder", "pipe"]


# What is written elsewhere lies in a folder that is renamed when it is whole, or is no file that is kept.
OTHER_WRITES = {
    "data/corpus.py": "(entry / META_FILE).write_text(",  # cache.py renames the entry
    "report/drawing.py": "figure.savefig(",  # into memory
    "benchmarks/memory.py": "_CLEAR_REFS.write_text(",  # of the kernel's
    "benchmarks/serving/servers.py": '(folder / "config.json").write_text(',  # in a temporary folder
}


def test_no_source_writes_a_file_past_these():
    root = Path(__file__).parents[1]
    found = {}
    for folder in (root / "src/stablemask", root / "benchmarks", root / "studies"):
        for path in folder.rglob("*.py"):
            name = str(path.relative_to(root)).removeprefix("src/stablemask/")
            for line in path.read_text(encoding="utf-8").splitlines():
                write = re.search(r"\S.*\.(write_text|write_bytes|savefig)\(", line)
                if write and not re.search(r"partial(\.| / .*\)\.)write|savefig\(partial", line):
                    found[name] = write[0]
    assert found == OTHER_WRITES
