"""One writer at a time, and places that cannot be written to."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stablemask.cli.main import main
from stablemask.errors import InputError
from stablemask.writing import only_writer, writing

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
