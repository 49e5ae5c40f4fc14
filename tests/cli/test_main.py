"""Exit codes, and one line for each mistake."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import types
import warnings
from dataclasses import dataclass

import pytest

from stablemask import __version__
from stablemask.cli import main as cli
from stablemask.errors import InputError, RunError
from stablemask.options import option
from tests import marks

FULL = "stablemask: error: no space left on the disk; free some and run again\n"


def stablemask(*argv: str, **streams) -> subprocess.CompletedProcess:
    return python("-m", "stablemask", *argv, **streams)


def python(*argv: str, **streams) -> subprocess.CompletedProcess:
    # What `main` sets for its own process must not reach a new one from the tests'.
    hidden = ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    return subprocess.run([sys.executable, *argv], text=True, env=environment, **streams)


@dataclass(kw_only=True)
class FakeOptions:
    """Do nothing."""

    count: int = option(1, "how many")


@pytest.fixture
def command(monkeypatch):
    """Put a function in place of a command, to see what `main` makes of how it ends."""

    def install(function):
        module = types.ModuleType("stablemask.cli.fake")
        module.run = function
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.COMMANDS, "fake", FakeOptions)

    return install


def raising(error: BaseException):
    def function(options):
        raise error

    return function


def test_help_and_version(capsys):
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    lines = [line.split(maxsplit=1) for line in said.splitlines() if line.startswith("  ")]
    assert [name for name, _ in lines] == list(cli.COMMANDS)
    assert max(map(len, said.splitlines())) <= 100
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"stablemask {__version__}\n"


def test_help_and_mistakes_of_every_command_load_nothing_that_takes_long():
    code = (
        "import sys\n"
        "from stablemask.cli.main import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    assert main([name, '--no-such-flag']) == 2\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "main(['--help']); main(['nothing'])\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "sys.exit(str(loaded & {'torch', 'transformers', 'yaml', 'numpy'}))"
    )
    result = python("-c", code)
    assert result.stderr.endswith("\nset()\n")


def test_a_command_whose_package_is_not_installed(monkeypatch, capsys):
    def import_module(name):
        raise ModuleNotFoundError(name="transformers.utils")

    monkeypatch.setattr(cli.importlib, "import_module", import_module)
    assert cli.main(["generate", "--model", "m", "--prompt", "p"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stablemask: error: generate needs the package 'transformers': ")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no command given"),
        (["pretrian"], "no command 'pretrian'; did you mean pretrain?"),
        (["xyz"], "no command 'xyz'; the commands are env, build, "),
        (["env", "--jsno"], "unrecognized arguments: --jsno; did you mean --json?"),
        (["env", "--config", "absent.yaml"], "cannot read 'absent.yaml'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(argv, words, capsys):
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == ""
    assert line.startswith("stablemask: error: ")
    assert words in line


def test_result_of_a_command_is_the_exit_code(command):
    command(lambda options: None)
    assert cli.main(["fake"]) == 0
    command(lambda options: options.count)
    assert cli.main(["fake", "--count", "3"]) == 3


def test_a_warning_of_ours_is_one_line(command, monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    command(lambda options: None)
    assert cli.main(["fake"]) == 0
    ours = ("2 of 3 files are read", UserWarning, cli.__file__, 1)
    assert warnings.formatwarning(*ours) == "stablemask: 2 of 3 files are read\n"
    assert "UserWarning: slow" in warnings.formatwarning("slow", UserWarning, "other.py", 1)
    monkeypatch.setenv("RANK", "1")
    assert warnings.formatwarning(*ours) == ""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("two\n  lines"), 2, "error: two lines"),
        (RunError("the loss is nan"), 1, "error: the loss is nan"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/root/x"),
            2,
            "error: no permission for /root/x; Permission denied",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "out/model"),
            2,
            "error: cannot use out/model: Read-only file system; name another path",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/model"),
            1,
            "error: no space left on the disk for out/model; free some and run again",
        ),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            1,
            "error: no space left on the disk; free some and run again",
        ),
    ],
)
def test_expected_failures_are_one_line(command, capfd, error, code, line):
    command(raising(error))
    assert cli.main(["fake"]) == code
    assert capfd.readouterr().err == f"stablemask: {line}\n"


@pytest.mark.parametrize("error", [ValueError("bug"), OSError(errno.EIO, "I/O"), KeyError("bug")])
def test_bugs_keep_their_traceback(command, error):
    command(raising(error))
    with pytest.raises(type(error)):
        cli.main(["fake"])


@marks.full_disk
@pytest.mark.parametrize("argv", [["--version"], ["env", "--help"]])
def test_a_full_disk_under_stdout(argv):
    with open("/dev/full", "w") as full:
        result = stablemask(*argv, stdout=full)
    assert (result.returncode, result.stderr) == (1, FULL)


@pytest.mark.parametrize("argv", [["--help"], ["env", "--help"]])
def test_a_reader_that_went_away(argv):
    read, write = os.pipe()
    os.close(read)
    result = stablemask(*argv, stdout=write)
    os.close(write)
    assert (result.returncode, result.stderr) == (141, "")


def test_nothing_of_the_libraries_on_the_screen(model_folder, text_file, tmp_path):
    """The commands as a user starts them, in one process of their own."""
    damaged = tmp_path / "damaged"
    shutil.copytree(model_folder, damaged)
    (damaged / "tokenizer.json").write_text("{")
    model = ["--model", model_folder]
    commands = [
        ["generate", *model, "--prompt", "the", "--stream"],
        ["evaluate", *model, "--data", text_file, "--lengths", "1x"],
        ["inspect", *model, "--text", "the quick brown fox", "--out", str(tmp_path / "page.html")],
        ["generate", "--model", str(damaged), "--prompt", "the"],
    ]
    code = "import sys; from stablemask.cli.main import main\n" + "".join(
        f"print('exit', main({command!r}))\n" for command in commands
    )
    result = python("-c", code)
    exits = [line for line in result.stdout.splitlines() if line.startswith("exit")]
    assert exits == ["exit 0", "exit 0", "exit 0", "exit 2"]
    (line,) = result.stderr.splitlines()
    assert line.startswith("stablemask: error: ")
    assert str(damaged) in line


def test_ctrl_c_stops_a_running_command():
    code = (
        "import sys, time\n"
        "from stablemask.cli.main import exit_code\n"
        "sys.exit(exit_code(lambda: print('running', flush=True) or time.sleep(60)))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (130, "stablemask: interrupted\n")
