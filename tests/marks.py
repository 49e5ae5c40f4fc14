"""Every reason to skip a test, in one place."""

import os
import platform
import shutil
import sys
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch
from packaging.version import Version

from stablemask.backends import flash_attn, flex, native

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; none here"),
]

# What other tests cover in most of it, at the price of many processes or of a compilation.
nightly = pytest.mark.skipif(
    os.environ.get("HYPOTHESIS_PROFILE") != "nightly", reason="takes long; `make nightly` does it"
)

two_gpus = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]

full_disk = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
proc = pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")

# Of the extra `dev` there, as pre-commit is; with the one and without the other it is an error.
triton = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64")
    or (find_spec("triton") is None and find_spec("pre_commit") is None),
    reason="needs Triton, of the extra `dev` on Linux x86-64",
)

peers = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("flash_attention_softmax_n", "x_transformers")),
    reason="needs the packages of the extra `bench`",
)

flash_attn_on_gpu = [
    *gpu,
    pytest.mark.skipif(
        all(flash_attn.problem(package) for package in flash_attn.MODULES),
        reason="needs the flash-attn package; none here",
    ),
]
cpp_compiler = pytest.mark.skipif(
    flex.cpu_problem() is not None, reason=flex.cpu_problem() or "FlexAttention works on this CPU"
)

compiler = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
avx512 = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX512"),
    reason="needs a processor with AVX-512, which is taken for one without",
)
native_library = pytest.mark.skipif(
    native.load() is None, reason="needs the library that `stablemask build` compiles"
)

torchao = pytest.mark.skipif(
    find_spec("torchao") is None, reason="needs torchao, the extra `quant`"
)
argcomplete = pytest.mark.skipif(
    find_spec("argcomplete") is None, reason="needs the package argcomplete"
)
gguf = pytest.mark.skipif(find_spec("gguf") is None, reason="needs the package gguf")


TRANSFORMERS = Version(version("transformers"))


def transformers_since(oldest: str):
    return pytest.mark.skipif(
        Version(oldest) > TRANSFORMERS,
        reason=f"needs Transformers {oldest}, here is {TRANSFORMERS}",
    )


# Whatever the attention: its layers do not tell the paged cache the keywords that it asks for.
neox_continuous_batching = pytest.mark.xfail(
    TRANSFORMERS.release[:2] == (5, 24),
    reason="Transformers 5.24's GPT-NeoX cannot run its own continuous batching",
    strict=True,
)


def _server_problem() -> str | None:
    if any(find_spec(name) is None for name in ("openai", "pydantic", "starlette", "uvicorn")):
        return "needs the packages of the extra `serve`"
    return None


SERVER_PROBLEM = _server_problem()
server = pytest.mark.skipif(SERVER_PROBLEM is not None, reason=SERVER_PROBLEM or "")

vllm = pytest.mark.skipif(
    find_spec("vllm") is None, reason="needs vLLM, in an environment of its own: `make vllm-test`"
)
ADAPTED_MODEL = "STABLEMASK_ADAPTED_MODEL"
adapted_model = pytest.mark.skipif(
    ADAPTED_MODEL not in os.environ,
    reason=f"needs the folder of a model that `stablemask finetune --adapt` wrote, in ${ADAPTED_MODEL}",
)
