"""`stablemask export`, on a saved model."""

import json
from unittest.mock import Mock

import pytest
import torch

from stablemask.cli import export
from stablemask.cli.main import main
from stablemask.inference import export as inference_export
from tests import marks


def test_an_onnx_file_in_half_precision_is_checked(model_folder, tmp_path, monkeypatch, capsys):
    """With its weights in the file beside it, as a large model's are."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(inference_export, "_WEIGHTS_IN_THE_FILE", 0)
    out = tmp_path / "model.onnx"
    assert main(["export", "--model", model_folder, "--out", str(out), "--dtype", "float16"]) == 0
    line, last = capsys.readouterr().out.splitlines()
    summary = json.loads(last)
    assert line.startswith(f"{out}: outputs within ")
    assert 0 < summary["difference"] < 0.03
    written = {str(path): path.stat().st_size for path in tmp_path.iterdir()}
    assert summary["files"] == written
    assert written.keys() == {str(out), f"{out}.data"}
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


@pytest.mark.parametrize(
    ("found", "code", "words"),
    [
        ([float("nan")], 1, "model.pt2 is not the model: its outputs differ"),
        (KeyboardInterrupt, 130, "interrupted"),
    ],
)
def test_what_was_there_stays_until_the_new_file_is_checked(
    model_folder, tmp_path, monkeypatch, capsys, found, code, words
):
    monkeypatch.setattr(export, "largest_difference", Mock(side_effect=found))
    out = tmp_path / "model.pt2"
    out.write_text("the last one")
    argv = ["export", "--model", model_folder, "--out", str(out)]
    assert main([*argv, "--batch-size", "1", "--length", "5"]) == code
    assert words in capsys.readouterr().err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        out.name: "the last one"
    }


def test_a_length_past_a_learned_table_is_refused(learned_folder, tmp_path, capsys):
    argv = ["export", "--model", learned_folder, "--out", str(tmp_path / "m.pt2")]
    assert main([*argv, "--batch-size", "1", "--length", "33"]) == 2
    assert "a length of 33 needs 33 positions" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


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
