"""Exit codes, and one line for each mistake, seen from outside the process."""

import errno
import os
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


def stablemask(*argv: str) -> subprocess.CompletedProcess:
    # What `main` sets for its own process must not reach a new one from the tests'.
    hidden = ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        [sys.executable, "-m", "stablemask", *argv],
        capture_output=True,
        text=True,
        env=environment,
    )


@dataclass(kw_only=True)
class FakeOptions:
    count: int = option(1, "how many")


@pytest.fixture
def command(monkeypatch):
    """Put a function in place of a command, to see what `main` makes of how it ends."""

    def install(function):
        def run(options: FakeOptions) -> int | None:
            return function(options)

        module = types.ModuleType("stablemask.cli.fake")
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(cli, "_available", lambda: ["fake"])

    return install


def raising(error: BaseException):
    def function(options):
        raise error

    return function


def test_help_lists_only_commands_that_exist():
    result = stablemask("--help")
    assert result.returncode == 0
    assert result.stderr == ""
    assert "\n  env " in result.stdout
    folder = os.path.dirname(cli.__file__)
    for name in cli.COMMANDS:
        assert (f"\n  {name} " in result.stdout) == os.path.exists(f"{folder}/{name}.py")


def test_every_command_has_a_summary():
    assert all(cli._summary(name) for name in cli._available())


def test_help_and_mistakes_load_no_command():
    code = (
        "import sys\n"
        "from stablemask.cli.main import main; main(['--help']); main(['nothing'])\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "sys.exit(bool(loaded & {'torch', 'transformers', 'yaml', 'numpy'}))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_a_command_whose_package_is_not_installed():
    code = (
        "import sys; sys.modules['transformers'] = None; from stablemask.cli.main import main;"
        "sys.exit(main(['generate', '--model', 'm', '--prompt', 'p']))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    expected = "stablemask: error: generate needs the package 'transformers': "
    assert result.stderr.startswith(expected)
    assert result.stderr.count("\n") == 1


def test_version():
    assert stablemask("--version").stdout == f"stablemask {__version__}\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "no command given"),
        (["pretrian"], "no command 'pretrian'"),
        (["env", "--jsno"], "--jsno"),
        (["env", "--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(argv, words):
    result = stablemask(*argv)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("stablemask: error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


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
        (InputError("two\n  lines"), 2, "stablemask: error: two lines\n"),
        (RunError("the loss is nan"), 1, "stablemask: error: the loss is nan\n"),
        (KeyboardInterrupt(), 130, "stablemask: interrupted\n"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/root/x"),
            2,
            "stablemask: error: no permission for /root/x; Permission denied\n",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "out/model"),
            2,
            "stablemask: error: cannot use out/model: Read-only file system; name another path\n",
        ),
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "nnn"),
            2,
            "stablemask: error: cannot use nnn: File name too long; name another path\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/model"),
            1,
            "stablemask: error: no space left on the disk for out/model; free some and run again\n",
        ),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            1,
            "stablemask: error: no space left on the disk; free some and run again\n",
        ),
    ],
)
def test_expected_failures_are_one_line(command, capfd, error, code, line):
    command(raising(error))
    assert cli.main(["fake"]) == code
    assert capfd.readouterr().err == line


@pytest.mark.parametrize("error", [ValueError("bug"), OSError(errno.EIO, "I/O"), KeyError("bug")])
def test_bugs_keep_their_traceback(command, error):
    command(raising(error))
    with pytest.raises(type(error)):
        cli.main(["fake"])


@marks.full_disk
@pytest.mark.parametrize("argv", [["env", "--help"], ["env"]])
def test_a_full_disk_under_stdout(argv):
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "-m", "stablemask", *argv],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert result.returncode == 1
    assert (
        result.stderr == "stablemask: error: no space left on the disk; free some and run again\n"
    )


@pytest.mark.parametrize("argv", [["--help"], ["env", "--help"]])
def test_a_reader_that_went_away(argv):
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-m", "stablemask", *argv], stdout=write, stderr=subprocess.PIPE
    )
    os.close(write)
    assert process.returncode == 141
    assert process.stderr == b""


def test_ctrl_c_stops_a_running_command():
    code = (
        "import sys, types, time; from dataclasses import dataclass\n"
        "from stablemask.cli import main as cli\n"
        "@dataclass\n"
        "class Options: pass\n"
        "def run(options: Options) -> None: print('running', flush=True); time.sleep(60)\n"
        "sys.modules['stablemask.cli.fake'] = module = types.ModuleType('stablemask.cli.fake')\n"
        "module.run, cli._available = run, lambda: ['fake']\n"
        "sys.exit(cli.main(['fake']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "running\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (130, "stablemask: interrupted\n")
