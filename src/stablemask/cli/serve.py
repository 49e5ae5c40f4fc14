"""Serve a model over HTTP, with the API of OpenAI: by vLLM, or by the small server of ours."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from ipaddress import ip_address
from typing import Any
from urllib.request import ProxyHandler, build_opener

from stablemask.cli.models import load
from stablemask.cli.options import ServeOptions
from stablemask.data import load_tokenizer
from stablemask.errors import InputError, RunError
from stablemask.hf.loading import is_adapter, load_config
from stablemask.inference.serving import bind, build_app, serve
from stablemask.options import check_least

# What this vLLM serves, plug-ins and all. It logs to stdout too, so the last line counts.
ARCHITECTURES = (
    "from vllm.plugins import load_general_plugins as load; load()\n"
    "from vllm import ModelRegistry; print(*ModelRegistry.get_supported_archs())"
)
# Seconds in which vLLM may end by itself.
PATIENCE = 30


def run(options: ServeOptions) -> None:
    key = os.environ.get("STABLEMASK_API_KEY") if options.api_key is None else options.api_key
    if key == "":
        raise InputError("the API key is empty; leave it out to ask for none")
    check_least(options, tensor_parallel_size=1)
    with bind(options.host, options.port) as listener:
        host, port = listener.getsockname()[:2]
        if key is None and not ip_address(host).is_loopback:
            _say(f"anyone who reaches {options.host} may ask; --api-key asks for a key")
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        ready = f"serving {options.model} at {address}/v1; Ctrl-C ends it"
        if not _takes_vllm(options):
            app = build_app(
                load(options),
                load_tokenizer(options.model),
                name=options.model,
                max_model_len=options.max_model_len,
                api_key=key,
                cors_origins=options.cors_origins,
            )
            serve(app, listener, ready)
            return
    _run_vllm(_vllm_command(options, port), key, address, ready)


def _say(line: str) -> None:
    print(f"stablemask: {line}", file=sys.stderr, flush=True)


def _takes_vllm(options: ServeOptions) -> bool:
    """Whether vLLM is to serve.

    Raises:
        InputError: it is named, or its flags are given, and it cannot.
    """
    reason = _reason_against_vllm(options)
    if reason is None:
        return True
    if options.engine == "vllm":
        raise InputError(f"vLLM cannot serve {options.model}: {reason}")
    if options.tensor_parallel_size > 1 or options.engine_args:
        raise InputError(
            f"--tensor-parallel-size and flags after -- are for vLLM, and Transformers serves: {reason}"
        )
    if options.engine == "auto" and find_spec("vllm") is not None:
        _say(f"Transformers serves, one request after another: {reason}")
    return False


def _reason_against_vllm(options: ServeOptions) -> str | None:
    if options.engine == "transformers":
        return "--engine says so"
    if find_spec("vllm") is None:
        return "vLLM is not installed (docs/serving.md says how)"
    if options.device is not None:
        return "--device is for Transformers; vLLM takes the device it was built for"
    if is_adapter(options.model):
        return "it is an adapter; `stablemask merge` makes a whole model of it"
    if options.engine == "vllm":
        return None  # it says itself what it does not serve
    query = [sys.executable, "-c", ARCHITECTURES]
    found = subprocess.run(query, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        return f"vLLM fails here ({(found.stderr.strip().splitlines() or ['no reason given'])[-1]})"
    wanted = load_config(options.model).architectures or []
    served = found.stdout.strip().splitlines()[-1].split()
    return None if set(wanted) & set(served) else f"vLLM does not know {' '.join(wanted)}"


def _vllm_command(options: ServeOptions, port: int) -> list[str]:
    flags: dict[str, Any] = {
        "model": options.model,
        "served-model-name": options.model,
        "host": options.host,
        "port": port,
        "dtype": options.dtype,
        "max-model-len": options.max_model_len,
        "tensor-parallel-size": options.tensor_parallel_size,
        "allowed-origins": json.dumps(options.cors_origins),
    }
    given = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    module = "vllm.entrypoints.openai.api_server"
    return [sys.executable, "-m", module, *given, *options.engine_args]


def _run_vllm(command: list[str], key: str | None, address: str, ready: str) -> None:
    """Run it until it ends or we are told to end; it and all its processes end with us."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # Not in the command, which every user of the machine can read.
    environment = os.environ | ({} if key is None else {"VLLM_API_KEY": key})
    # Of a session of its own, so that a terminal's Ctrl-C comes to it once, from here.
    with subprocess.Popen(command, env=environment, start_new_session=True) as server:
        try:
            while server.poll() is None and not _is_healthy(address):
                time.sleep(0.2)
            if server.poll() is None:
                print(ready, flush=True)
            if status := server.wait():
                raise RunError(f"vLLM ended with exit code {status}; what it said above tells why")
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)


def _is_healthy(address: str) -> bool:
    try:
        with build_opener(ProxyHandler({})).open(f"{address}/health", timeout=2):
            return True
    except OSError:
        return False
