"""`stablemask evaluate`, on a saved model."""

import json

import pytest

from stablemask.cli.main import main
from stablemask.data import load_documents, load_tokenizer, tokenize_documents
from stablemask.evaluation import perplexity
from stablemask.hf.loading import load_model

from .test_main import stablemask


@pytest.fixture
def run(model_folder, text_file, capsys):
    def run(*argv: str) -> tuple[list[str], dict]:
        assert main(["evaluate", "--model", model_folder, "--data", text_file, *argv]) == 0
        *table, last = capsys.readouterr().out.splitlines()
        return table, json.loads(last)

    return run


def test_table_and_json_hold_what_the_function_returns(run, model_folder, text_file):
    table, summary = run("--split", "all", "--lengths", "1x,2x", "100", "--stride", "16")
    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    text = load_documents(text_file)
    tokens = tokenize_documents(text, tokenizer)
    assert [row["length"] for row in summary["results"]] == [32, 64, 100]
    for row, line in zip(summary["results"], table[1:], strict=True):
        result = perplexity(model, tokens, length=row["length"], stride=16, progress=False)
        assert row["perplexity"] == pytest.approx(result.perplexity)
        assert row["tokens"] == result.tokens == len(tokens) - 1
        bytes_per_token = len(text[0].encode()) / len(tokens)
        assert row["bits_per_byte"] * bytes_per_token == pytest.approx(
            result.nats_per_token / 0.6931471805599453
        )
        length, multiple, shown, *_ = line.split()
        assert int(length) == row["length"]
        assert float(multiple.removesuffix("x")) == row["length"] / 32
        assert float(shown) == pytest.approx(row["perplexity"], abs=0.006)
    assert summary["trained_length"] == 32
    assert summary["model"] == model_folder


def test_defaults_go_past_the_training_length(run):
    _, summary = run("--max-tokens", "300")
    assert summary["split"] == "validation"
    assert [row["length"] for row in summary["results"]] == [32, 64, 128]
    assert [row["stride"] for row in summary["results"]] == [16, 32, 64]


def test_json_alone(run):
    table, summary = run("--json", "--lengths", "32", "--max-tokens", "100")
    assert table == []
    assert summary["results"][0]["tokens"] == 99


def test_text_column(model_folder, tmp_path, capsys):
    path = tmp_path / "records.jsonl"
    path.write_text("\n".join(json.dumps({"body": "the lazy dog " * 50}) for _ in range(3)))
    argv = ["evaluate", "--model", model_folder, "--data", str(path), "--lengths", "1x"]
    assert main([*argv, "--split", "all", "--text-column", "body"]) == 0
    capsys.readouterr()
    assert main(argv) == 2
    assert "'text'" in capsys.readouterr().err


def test_a_length_that_cannot_be_scored_says_why_beside_the_others(
    learned_folder, text_file, capsys
):
    argv = ["evaluate", "--model", learned_folder, "--data", text_file, "--max-tokens", "200"]
    assert main([*argv, "--lengths", "1x,2x,400"]) == 0
    output = capsys.readouterr().out.splitlines()
    assert "64        2x  not scored: a window of 64 tokens needs 64 positions" in output[2]
    good, past, _ = json.loads(output[-1])["results"]
    assert good["tokens"] > 150
    assert "table has 32" in past["error"]


def test_as_a_user_types_it(model_folder, text_file):
    result = stablemask("evaluate", "--model", model_folder, "--data", text_file, "--lengths", "1x")
    assert result.returncode == 0
    assert result.stderr == ""
    assert json.loads(result.stdout.splitlines()[-1])["results"][0]["perplexity"] > 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--data", "absent.txt"], "absent.txt"),
        (["--lengths", "long"], "lengths must be tokens such as 512"),
        (["--lengths", "infx"], "lengths must be tokens such as 512"),
        (["--lengths", "100000"], "less than a window of 100000"),
        (["--lengths", "1"], "length must be at least 2, got 1"),
        (["--lengths", "16,32", "--stride", "0"], "stride must be from 1"),
        (["--max-tokens", "0"], "max_tokens must be at least 1, got 0"),
        (["--split", "test"], "--split: 'test' is not one of validation, train, all"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_bad_input(model_folder, text_file, capsys, argv, words):
    assert main(["evaluate", "--model", model_folder, "--data", text_file, *argv]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("stablemask: error: ")
    assert words in error
