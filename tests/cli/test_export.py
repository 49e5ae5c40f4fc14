"""`stablemask export`, on a saved model."""

import json

import pytest
import torch

from stablemask.cli import export
from stablemask.cli.main import main
from tests import marks


def test_an_onnx_file_in_half_precision_is_checked(model_folder, tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    out = tmp_path / "model.onnx"
    assert main(["export", "--model", model_folder, "--out", str(out), "--dtype", "float16"]) == 0
    line, last = capsys.readouterr().out.splitlines()
    summary = json.loads(last)
    assert line.startswith(f"{out}: outputs within ")
    assert 0 < summary["difference"] < 0.03
    assert summary["files"] == {str(out): out.stat().st_size}
    (logits,) = onnx.load(out).graph.output
    assert logits.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


def test_a_program_of_one_shape(model_folder, tmp_path, capsys):
    out = tmp_path / "model.pt2"
    argv = ["export", "--model", model_folder, "--out", str(out)]
    assert main([*argv, "--batch-size", "1", "--length", "5"]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["shape"], summary["difference"]) == ([1, 5], 0.0)
    program = torch.export.load(out)
    assert program.module()(torch.ones(1, 5).long(), torch.ones(1, 5).long())[0].shape[:2] == (1, 5)
    with pytest.raises(AssertionError, match="Guard failed: input_ids"):
        program.module()(torch.ones(1, 6).long(), torch.ones(1, 6).long())


def test_a_file_that_is_not_the_model_fails_the_run(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "largest_difference", lambda *_, **__: float("nan"))
    argv = ["export", "--model", model_folder, "--out", str(tmp_path / "model.pt2")]
    assert main([*argv, "--batch-size", "1", "--length", "5"]) == 1
    assert "model.pt2 is not the model: its outputs differ" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--out", "model.bin"], "--out must end in .onnx or .pt2, got 'model.bin'"),
        (["--out", "absent/model.onnx"], "no folder at 'absent'"),
        pytest.param(["--out", "/proc/m.onnx"], "cannot write to '/proc/m.onnx'", marks=marks.proc),
        (["--out", "m.onnx", "--dtype", "bfloat16"], "few operators in bfloat16"),
        (["--out", "m.pt2", "--length", "4"], "--batch-size and --length fix the shape together"),
        (
            ["--out", "m.pt2", "--length", "0", "--batch-size", "1"],
            "--batch-size and --length fix the shape together, each at least 1",
        ),
        (
            ["--out", "m.pt2", "--length", "4", "--batch-size", "1", "--cache"],
            "a shape can only be fixed without a cache",
        ),
    ],
)
def test_mistakes(model_folder, tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--model", model_folder, *argv]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("stablemask: error: ")
    assert words in last
    assert list(tmp_path.iterdir()) == []
