"""`stablemask serve`, as a user starts and ends it."""

import json
import os
import signal
import subprocess
import sys

import openai
import pytest

from stablemask.cli.main import main
from stablemask.inference.serving import bind

# In the place of vLLM: it notes how it was called, answers one question, and has its parent told of Ctrl-C.
STAND_IN = {
    "__init__.py": """
class ModelRegistry:
    @staticmethod
    def get_supported_archs():
        print("a line of its log")
        return ["StableMaskForCausalLM"]
""",
    "plugins.py": "def load_general_plugins(): pass",
    "entrypoints/openai/api_server.py": """
import http.server, json, os, signal, sys, threading

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
        threading.Timer(0.5, os.kill, (os.getppid(), signal.SIGINT)).start()

given = dict(flag.split("=", 1) for flag in sys.argv[1:] if "=" in flag)
with open(os.environ["RECORD"], "w") as record:
    json.dump([sys.argv[1:], os.environ.get("VLLM_API_KEY")], record)
if given["--max-model-len"] == "7":
    sys.exit(3)
try:
    http.server.HTTPServer((given["--host"], int(given["--port"])), Handler).serve_forever()
except KeyboardInterrupt:
    with open(os.environ["RECORD"], "a") as record:
        record.write("\\nended")
""",
}


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    for name, text in STAND_IN.items():
        path = tmp_path / "packages" / "vllm" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    packages = str(tmp_path / "packages")
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, [packages, os.environ.get("PYTHONPATH")]))
    )
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    term = signal.getsignal(signal.SIGTERM)
    yield tmp_path / "record"
    signal.signal(signal.SIGTERM, term)


def test_as_a_user_types_it(model_folder):
    command = [sys.executable, "-m", "stablemask", "serve", "--model", model_folder, "--port", "0"]
    with subprocess.Popen(
        [*command, "--max-model-len", "100000", "--engine", "transformers"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "STABLEMASK_API_KEY": "sesame"},
    ) as server:  # fmt: skip
        try:
            line = server.stdout.readline()
            assert line.startswith(f"serving {model_folder} at http://127.0.0.1:")
            url = line.split(" at ")[1].partition(";")[0]
            client = openai.OpenAI(base_url=url, api_key="sesame", max_retries=0, timeout=60)
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
    assert (server.returncode, out) == (130, "")
    first, *_, last = err.splitlines()
    assert " POST /v1/completions 200 " in first
    assert first.endswith("answer=5")
    assert last == "stablemask: interrupted"


@pytest.mark.parametrize("engine", ["auto", "vllm"])
def test_vllm_serves_where_it_is_installed(vllm, model_folder, capfd, monkeypatch, engine):
    monkeypatch.setenv("STABLEMASK_API_KEY", "sesame")
    argv = ["--max-model-len", "50", "--tensor-parallel-size", "2", "--dtype", "float32"]
    argv += ["--cors-origins", "https://chat.example", "--engine", engine, "--", "--seed", "1"]
    assert main(["serve", "--model", model_folder, "--port", "0", *argv]) == 130
    record, ended = vllm.read_text().splitlines()
    (*given, key) = json.loads(record)
    port = given[0][3].partition("=")[2]
    assert given[0] == [
        f"--model={model_folder}", f"--served-model-name={model_folder}", "--host=127.0.0.1",
        f"--port={port}", "--dtype=float32", "--max-model-len=50", "--tensor-parallel-size=2",
        '--allowed-origins=["https://chat.example"]', "--seed", "1",
    ]  # fmt: skip
    assert (key, ended) == ("sesame", "ended")
    out, err = capfd.readouterr()
    assert out == f"serving {model_folder} at http://127.0.0.1:{port}/v1; Ctrl-C ends it\n"
    assert err.splitlines()[-1] == "stablemask: interrupted"


def test_vllm_that_cannot(vllm, model_folder, learned_folder, capsys, monkeypatch):
    start = ["--model", model_folder, "--port", "0", "--max-model-len", "7"]
    assert main(["serve", *start]) == 1
    assert "vLLM ended with exit code 3" in capsys.readouterr().err
    error = fails(capsys, *start, "--engine", "vllm", "--device", "cpu")
    assert f"vLLM cannot serve {model_folder}: --device is for Transformers" in error
    monkeypatch.setattr("stablemask.cli.serve.ARCHITECTURES", "print('OtherForCausalLM')")
    error = fails(capsys, *start, "--", "--seed", "1")
    assert "flags after -- are for vLLM, and Transformers serves: vLLM does not know Sta" in error
    monkeypatch.setattr("stablemask.cli.serve.ARCHITECTURES", "raise ImportError('no libnuma')")
    error = fails(capsys, *start, "--tensor-parallel-size", "2")
    assert "--tensor-parallel-size and flags" in error
    assert "ImportError: no libnuma" in error


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
        (["--api-key", ""], "the API key is empty"),
        (["--tensor-parallel-size", "0"], "tensor_parallel_size must be at least 1, got 0"),
        (["--engine", "sglang"], "--engine: 'sglang' is not one of auto, vllm, transformers"),
        (["--engine", "transformers", "--", "--seed", "1"], "flags after -- are for vLLM"),
        (["--engine", "transformers", "--tensor-parallel-size", "2"], "--tensor-parallel-size"),
    ],
)
def test_bad_input(model_folder, capsys, argv, words):
    argv = argv and ["--port", "0", "--model", model_folder, *argv]
    assert words in fails(capsys, *argv)


def test_an_address_that_others_reach_is_told(model_folder, capsys):
    argv = ["--model", model_folder, "--port", "0", "--host", "0.0.0.0", "--max-model-len", "1"]
    assert main(["serve", *argv]) == 2
    assert "anyone who reaches 0.0.0.0 may ask; --api-key asks for a key" in capsys.readouterr().err
    assert main(["serve", *argv, "--api-key", "k"]) == 2
    assert "anyone" not in capsys.readouterr().err


def test_a_port_that_is_taken(model_folder, capsys):
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        error = fails(capsys, "--model", model_folder, "--port", port)
    assert f"cannot listen at 127.0.0.1 port {port}: Address already in use" in error
    assert "--port" in error


def test_without_a_web_server(model_folder, capsys, monkeypatch):
    for name in [name for name in sys.modules if "serv" in name and name.startswith("stablemask")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    error = fails(capsys, "--model", model_folder)
    assert "serve needs the package 'uvicorn'" in error
    assert "[serve]" in error
