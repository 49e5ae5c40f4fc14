"""`stablemask compare`, on runs of one's own."""

import json
import re
import shutil
from dataclasses import replace

import pytest

from stablemask.cli.main import main
from stablemask.training.pretrain import pretrain


@pytest.fixture(scope="module")
def longer(options, tmp_path_factory):
    """A run of the same design and text with another seed and twice the steps."""
    folder = tmp_path_factory.mktemp("longer") / "longer"
    pretrain(replace(options, attention="stablemask", steps=12, seed=1, out=str(folder)))
    return folder


def test_table_and_page(folders, longer, tmp_path, capsys):
    out = tmp_path / "report.html"
    runs = [str(folder) for folder in (*folders.values(), longer)]
    assert main(["compare", *runs, "--out", str(out), "--max-tokens", "1000"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["softmax", "stablemask", "longer"]
    found = [
        json.loads((folder / "run.json").read_text()) for folder in (*folders.values(), longer)
    ]
    shown = {re.split("  +", line)[0]: line.split()[-3:] for line in lines}
    losses = [record["result"]["eval_loss"] for record in found]
    assert [float(loss) for loss in shown["validation loss at the end"]] == pytest.approx(
        losses, abs=1e-4
    )
    assert len(set(losses)) == 3
    assert "attention on the first token" in shown
    assert "validation perplexity, 128 tokens (4x)" in shown
    assert "Mind that the runs differ in steps, seed and attention." in lines
    page = out.read_text()
    assert page.count("<figure>") == 7
    assert "on 384 to 768 tokens each" in page
    for record in found:
        assert record["command"] in page
    assert list(tmp_path.iterdir()) == [out]


def test_without_a_page(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *map(str, folders.values()), "--max-tokens", "200"]) == 0
    said = capsys.readouterr().out
    assert "The runs differ in attention and in nothing else" in said
    assert "report" not in said
    assert list(tmp_path.iterdir()) == []


def edited(name, change):
    def edit(folder):
        path = folder / name
        path.write_text(change(path.read_text()))

    return edit


def without(field):
    def change(text):
        record = json.loads(text)
        del record[field]
        return json.dumps(record)

    return change


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (shutil.rmtree, "holds no run; give a folder that `stablemask pretrain` made"),
        (lambda folder: (folder / "run.json").unlink(), "cannot read"),
        (edited("run.json", lambda text: text[:40]), "is not JSON"),
        (edited("run.json", lambda text: "[" * 100_000), "nested too deep"),
        (edited("run.json", lambda text: "[]"), "run.json is damaged"),
        (edited("run.json", without("corpus")), "run.json is damaged"),
        (edited("run.json", lambda text: re.sub(r'"eval_loss": [\d.]+', '"eval_loss": null', text)), "not finite"),
        (edited("run.json", without("result")), "has not finished; go on with it by --resume"),
        (edited("run.json", lambda text: text.replace('"corpus": "', '"corpus": "x')), "text or tok"),
        (edited("pretrain.yaml", lambda text: "preset: [tiny"), "is not valid YAML"),
        (edited("pretrain.yaml", lambda text: text.replace("attention: ", "attention: x")), "is not one"),
        (edited("pretrain.yaml", lambda text: "preset: tiny"), "steps, context, vocab_size"),
        (edited("pretrain.yaml", lambda text: text.replace("context: 32", "context: 64")), "is 32 and 64"),
        (edited("metrics.jsonl", lambda text: text + '{"step"'), "metrics.jsonl is damaged"),
        (edited("metrics.jsonl", lambda text: text + '{"loss": 3.0}'), "metrics.jsonl is damaged"),
        (lambda folder: (folder / "metrics.jsonl").unlink(), "cannot read"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no .safetensors weights"),
    ],
)  # fmt: skip
def test_a_folder_that_is_no_sound_run(folders, tmp_path, capsys, spoil, words):
    other = tmp_path / "other"
    shutil.copytree(folders["stablemask"], other)
    spoil(other)
    out = tmp_path / "report.html"
    argv = ["compare", str(folders["softmax"]), str(other), "--max-tokens", "200"]
    assert main([*argv, "--out", str(out)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("stablemask: error: ")
    assert words in error
    assert not [path for path in tmp_path.iterdir() if path != other]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "two runs or more, got 0"),
        (["~nobody-here/a", "b"], "~nobody-here"),
        (["{run}"], "two runs or more, got 1"),
        (["{run}", "{run}/."], "a run is given twice"),
        (["{run}", "no/such/folder"], "no/such/folder holds no run"),
        (["{run}", "{run}/model.safetensors"], "holds no run"),
        (["{run}", "{other}", "--max-tokens", "1"], "max_tokens must be at least 2, got 1"),
        (["{run}", "{other}", "--out", "."], "cannot write .: it is a folder"),
        (["{run}", "{other}", "--prompt", "a"], "--prompt goes with --out"),
    ],
)
def test_bad_input(folders, capsys, argv, words):
    runs = {"run": folders["softmax"], "other": folders["stablemask"]}
    assert main(["compare", *(word.format(**runs) for word in argv)]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
