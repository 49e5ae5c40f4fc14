"""Triton's kernels without a GPU: in its interpreter on the CPU, and compiled for the cards they are for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import marks

pytestmark = marks.triton
CARDS = {"sm80": 80, "sm90": 90}


def test_in_the_interpreter():
    """In a process of its own, for the interpreter is chosen before Triton is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.backends.interpreted"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def compile_ahead(kernel, pointers, numbers, constants, card):
    """The machine code of a kernel, of whatever sizes and strides, for a card that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {
        name: pointers.get(name)
        or numbers.get(name)
        or ("constexpr" if name in constants else "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(kernel, signature, constants)
    return triton.compile(source, target=GPUTarget("cuda", CARDS[card], 32)).asm["cubin"]


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from stablemask.backends import triton_kernels

    return triton_kernels


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize(
    ("dtype", "sink", "biased"),
    [("bf16", "fp32", False), ("fp16", "*bf16", True), ("fp32", "*fp32", False)],
)
def test_the_share_compiles_for(kernels, card, dtype, sink, biased):
    constants = {"SINK_IS_NUMBER": sink == "fp32", "BIASED": biased, "ROWS": 32, "WIDTH": 64}
    pointers = {"out": f"*{dtype}", "result": f"*{dtype}", "lse": "*fp32", "top": f"*{dtype}"}
    if not biased:
        constants["top"] = None
        del pointers["top"]
    assert compile_ahead(kernels._take_share, pointers, {"sink": sink}, constants, card)


@pytest.mark.parametrize("card", CARDS)
def test_the_table_compiles_for(kernels, card):
    pointers = {"table": "*fp32", "positions": "*i64", "result": "*fp32"}
    assert compile_ahead(kernels._look_up, pointers, {}, {"BLOCK": 16}, card)


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_share_of_a_step_of_vllm_compiles_for(kernels, card, dtype):
    from stablemask.vllm.kernels import _take_share

    pointers = {"out": f"*{dtype}", "starts": "*i32", "lengths": "*i32"}
    pointers |= dict.fromkeys(("lse", "table", "shift"), "*fp32")
    assert compile_ahead(_take_share, pointers, {}, {"HEADS": 32, "WIDTH": 128}, card)
