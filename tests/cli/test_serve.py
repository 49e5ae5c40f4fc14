"""`stablemask serve`, as a user starts and ends it."""

import signal
import subprocess
import sys

import openai
import pytest

from stablemask.cli import serve
from stablemask.cli.main import main
from stablemask.inference.serving import bind
from stablemask.versions import OLDEST_SERVER


def test_as_a_user_types_it(model_folder):
    command = [sys.executable, "-m", "stablemask", "serve", "--model", model_folder, "--port", "0"]
    with subprocess.Popen(
        [*command, "--max-model-len", "100000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:  # fmt: skip
        try:
            line = server.stdout.readline()
            assert line.startswith(f"serving {model_folder} at http://127.0.0.1:")
            url = line.split(" at ")[1].partition(";")[0]
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)
            answer = client.completions.create(model=model_folder, prompt="the", max_tokens=5)
            assert answer.usage.completion_tokens == 5
            endless = client.completions.create(
                model=model_folder, prompt="the", max_tokens=90_000, stream=True
            )
            next(iter(endless))
            server.send_signal(signal.SIGINT)  # as Ctrl-C does
            out, err = server.communicate(timeout=60)
        finally:
            server.kill()
    assert server.returncode == 130
    assert (out, err) == ("", "stablemask: interrupted\n")


def fails(capsys, *argv: str) -> str:
    assert main(["serve", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    error = err.splitlines()[-1]
    assert error.startswith("stablemask: error: ")
    return error


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--model must be given"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--port", "http"], "--port: 'http' is not a whole number"),
        (["--port", "70000"], "port must be from 0 to 65535, got 70000"),
        (["--host", "no.such.host.invalid"], "cannot listen at no.such.host.invalid port 0"),
        (["--dtype", "float17"], "dtype"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--max-model-len", "1"], "max_model_len must be at least 2"),
    ],
)
def test_bad_input(model_folder, capsys, argv, words):
    argv = argv and ["--port", "0", "--model", model_folder, *argv]
    assert words in fails(capsys, *argv)


def test_a_port_that_is_taken(model_folder, capsys):
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        error = fails(capsys, "--model", model_folder, "--port", port)
    assert f"cannot listen at 127.0.0.1 port {port}: Address already in use" in error
    assert "--port" in error


def test_without_a_web_server(model_folder, capsys, monkeypatch):
    monkeypatch.setattr(serve, "is_serve_available", lambda: False)
    assert "pip install -e '.[serve]'" in fails(capsys, "--model", model_folder)


def test_below_its_floor_it_says_which_version_it_needs(model_folder, capsys, monkeypatch):
    monkeypatch.setattr(serve.transformers, "__version__", "5.16.1")
    error = fails(capsys, "--model", model_folder)
    assert f"serve needs Transformers {OLDEST_SERVER} or newer, this is 5.16.1" in error


def test_nothing_else_needs_that_server():
    code = (
        "import sys\n"
        "for name in ('transformers.cli.serving', 'fastapi', 'uvicorn', 'openai'):\n"
        "    sys.modules[name] = None\n"
        "import importlib, stablemask, stablemask.hf\n"
        "from stablemask.cli import main\n"
        "for name in main.COMMANDS: importlib.import_module(f'stablemask.cli.{name}')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
