"""`stablemask bench`: a ratio for each cell, of outputs that are right; how fast a machine is belongs to no test."""

import re

import pytest
import torch

from stablemask.cli import bench
from stablemask.cli.main import main

QUICK = ["bench", "--lengths", "32", "64"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(bench, "TOKENS", 64)
    monkeypatch.setattr(bench, "BLOCK_SECONDS", 0.0)
    monkeypatch.setattr(bench, "SECONDS", 0.001)


def test_every_cell_has_a_ratio(capsys):
    assert main(QUICK) == 0
    machine, _, head, *lines = filter(None, capsys.readouterr().out.splitlines())
    assert torch.__version__ in machine
    assert head.split() == ["tokens", "32", "64"]
    passes = ("forward", "forward+backward", "decoding")
    assert [line.split()[:2] for line in lines] == [
        [dtype, name] for dtype in ("float32", "bfloat16") for name in passes
    ]
    assert all(re.fullmatch(r"(\s+\d+\.\d\d){2}", line[27:]) for line in lines)


def test_only_a_backward_pass_is_timed_with_gradients(monkeypatch):
    modes = []

    def ratio(*given):
        modes.append(torch.is_grad_enabled())
        return 1.0

    monkeypatch.setattr(bench, "_ratio", ratio)
    assert main([*QUICK, "--lengths", "32"]) == 0
    assert modes == [False, True, False] * 6


def test_the_ratio_is_ours_over_the_stock_calls(monkeypatch):
    taken = {"ours": 3.0, "stock": 2.0}
    monkeypatch.setattr(bench, "_seconds", lambda function, calls, device: taken[function()])
    assert bench._ratio(lambda: "ours", lambda: "stock", "cpu") == 1.5


def test_a_wrong_output_is_not_timed(monkeypatch, capsys):
    right = bench.stable_mask_attention

    def wrong(*tensors, backend="auto", **given):
        out = right(*tensors, backend=backend, **given)
        return out if backend == "reference" else 1.01 * out

    monkeypatch.setattr(bench, "stable_mask_attention", wrong)
    assert main(QUICK) == 1
    assert "our output in torch.float32 is" in capsys.readouterr().err


def test_bad_input_is_one_line(capsys):
    assert main([*QUICK, "--lengths", "1"]) == 2
    assert "lengths must be at least 2 each, got [32, 64, 1]" in capsys.readouterr().err
