"""`stablemask inspect`, on saved models."""

import json
import os
from pathlib import Path

import pytest

from stablemask.cli.main import main
from stablemask.data import load_tokenizer

from ..evaluation.families import tiny_transformer

TEXT = "the quick brown fox jumps over the lazy dog and the fox"


def save(folder: Path, model_folder: str, family: str) -> str:
    tokenizer = load_tokenizer(model_folder)
    tiny_transformer(family, vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llama_folder(model_folder, tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("llama"), model_folder, "Llama")


@pytest.fixture(scope="module")
def bloom_folder(model_folder, tmp_path_factory) -> str:
    return save(tmp_path_factory.mktemp("bloom"), model_folder, "Bloom")


@pytest.fixture
def run(model_folder, tmp_path, capsys):
    out = tmp_path / "report.html"

    def run(*argv: str) -> tuple[str, str]:
        given = ["--model", model_folder, "--text", TEXT, "--out", str(out), *argv]
        assert main(["inspect", *given]) == 0
        assert list(tmp_path.iterdir()) == [out]
        return capsys.readouterr().out, out.read_text()

    return run


def test_one_model(run, model_folder, tmp_path):
    printed, page = run()
    assert f"Inside {Path(model_folder).name}" in page
    assert page.count("<details") == 2
    assert (tmp_path / "report.html").as_uri() in printed
    assert "attention on the first token" in printed


def test_two_models_side_by_side(run, model_folder, llama_folder):
    printed, page = run("--against", llama_folder)
    ours, theirs = Path(model_folder).name, Path(llama_folder).name
    assert f"Inside {ours} and {theirs}" in page
    assert page.count("<details") == 3
    assert "softmax" in printed
    assert "stablemask" in printed


def test_a_token_in_front_is_the_first_models_alone(run, model_folder, llama_folder):
    (token,) = load_tokenizer(model_folder).encode("q", add_special_tokens=False)
    printed, page = run("--prefix", "q", "--against", llama_folder)
    (row,) = [line for line in printed.splitlines() if line.startswith("in front of the text")]
    assert row.split("text", 1)[1].split() == ["q", "nothing"]
    assert run("--prefix", str(token), "--against", llama_folder) == (printed, page)


def test_the_same_folder_name_is_told_apart(run, model_folder, llama_folder, tmp_path_factory):
    same = tmp_path_factory.mktemp("other") / Path(model_folder).name
    same.symlink_to(llama_folder)
    _, page = run("--against", str(same))
    assert f"Inside {model_folder} and {same}" in page


def test_a_model_that_asks_for_stablemask_runs_it(run, llama_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stable")
    for file in Path(llama_folder).iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "stablemask": {"gamma": 0.01}}))
    printed, _ = run("--model", str(folder))
    assert "stablemask: gamma 0.01, infinite horizon" in printed
    assert "mask ratio                    0.0%" not in printed


def test_what_is_cut_is_said(run):
    printed, page = run("--max-tokens", "5")
    assert "5 of " in printed
    assert "reads the first 5 of" in page


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--text", ""], "has 0 tokens"),
        (["--text", os.fsdecode(b"\xff\xff")], "not valid Unicode"),
        (["--max-tokens", "1"], "max_tokens must be from 2 to 1024, got 1"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--against", "no/such/folder"], "no/such/folder"),
        (["--against", "{model}"], "--against must be another model"),
        (["--against", "{bloom}"], "BloomForCausalLM cannot be captured"),
        (["--prefix", "quick brown"], "--prefix must be one token, or its id; 'quick brown' is "),
        (["--prefix", "99999"], "token id 99999 is outside the model's vocabulary"),
        (["--prefix", "9" * 30], "token id 999999999999999999999999999999 is outside"),
        (["--device", "abacus"], "device 'abacus' cannot be used"),
        (["--out", "."], "cannot write .: it is a folder"),
        (["--out", "{tmp}/absent/report.html"], "No such file or directory"),
        (["--out", "{tmp}/" + 300 * "a"], "File name too long"),
    ],
)
def test_bad_input(model_folder, bloom_folder, tmp_path, capsys, argv, words):
    out = tmp_path / "report.html"
    out.write_text("older")
    argv = [word.format(model=model_folder, bloom=bloom_folder, tmp=tmp_path) for word in argv]
    given = ["--model", model_folder, "--text", TEXT, "--out", str(out), *argv]
    assert main(["inspect", *given]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("stablemask: error: ")
    assert words in error
    assert list(tmp_path.iterdir()) == [out]
    assert out.read_text() == "older"
