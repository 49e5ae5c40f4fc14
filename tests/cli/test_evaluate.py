"""`stablemask evaluate`, on a saved model."""

import json
import shutil

import pytest
import yaml

from stablemask.cli.main import main
from stablemask.data import load_documents, load_tokenizer, tokenize_documents
from stablemask.evaluation import perplexity
from stablemask.hf.loading import load_model


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
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--tasks", "any", "--stride", "8"], "--stride is of perplexity"),
        (["--tasks", "any", "--text-column", "body"], "--text-column is of perplexity"),
        (["--num-fewshot", "2"], "--num-fewshot is of tasks; name them with --tasks"),
        (["--tasks", "any", "--include-path", "own"], "include_path must be a folder"),
    ],
)
def test_bad_input(model_folder, text_file, capsys, argv, words):
    data = [] if "--tasks" in argv else ["--data", text_file]
    assert main(["evaluate", "--model", model_folder, *data, *argv]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("stablemask: error: ")
    assert words in error


def test_bits_are_those_of_the_bytes_that_are_read(model_folder, tmp_path, capsys):
    first = "the lazy dog jumps over the quick brown fox. " * 40
    texts = {"a": first, "b": "d o g " * 400}
    for name in texts:
        (tmp_path / f"{name}.txt").write_text(texts[name])
    tokens = len(tokenize_documents([first], load_tokenizer(model_folder)))
    bits = {}
    for data in ("a.txt", ""):
        argv = ["--data", str(tmp_path / data), "--split", "all", "--max-tokens", str(tokens)]
        _, found = evaluated(model_folder, capsys, *argv)
        (bits[data],) = [row["bits_per_byte"] for row in found["results"]]
    assert bits[""] == pytest.approx(bits["a.txt"])


def test_a_part_without_any_text(model_folder, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a")  # all of which is held out
    data = str(tmp_path / "a.txt")
    assert main(["evaluate", "--model", model_folder, "--data", data, "--split", "train"]) == 2
    assert "a.txt has no text in its train part" in capsys.readouterr().err


@pytest.fixture
def own_task(tmp_path):
    """A folder with a task: which word comes next."""
    examples = [
        {"text": "the quick brown", "words": ["fox", "dog"], "answer": 0},
        {"text": "jumps over the", "words": ["fox", "lazy dog"], "answer": 1},
        {"text": "the lazy", "words": ["quick", "dog"], "answer": 1},
    ]
    data = tmp_path / "examples.jsonl"
    data.write_text("\n".join(map(json.dumps, examples)))
    (tmp_path / "next_word.yaml").write_text(
        "task: next_word\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {tmp_path / 'cache'}}}\n"
        'doc_to_text: "{{text}}"\ndoc_to_choice: "{{words}}"\ndoc_to_target: answer\n'
    )
    return str(tmp_path)


def test_tasks(model_folder, own_task, capsys):
    pytest.importorskip("lm_eval")
    argv = ["evaluate", "--model", model_folder, "--tasks", "next_word", "--include-path", own_task]
    assert main([*argv, "--batch-size", "2"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    summary = json.loads(last)
    accuracy = summary["results"]["next_word"]["acc,none"]
    assert accuracy * 3 == pytest.approx(round(accuracy * 3))
    assert summary["num_fewshot"] == {"next_word": 0}
    assert summary["versions"].keys() == {"stablemask", "torch", "transformers", "lm_eval"}
    [row] = [line.split("|") for line in table if "next_word" in line and "acc " in line]
    assert float(row[7]) == pytest.approx(accuracy, abs=1e-4)

    assert main([*argv, "--limit", "1"]) == 0
    limited = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert limited["limit"] == limited["results"]["next_word"]["sample_len"] == 1


def test_a_perplexity_past_all_bounds_is_valid_json(model_folder, text_file, tmp_path, capsys):
    model, tokenizer = load_model(model_folder), load_tokenizer(model_folder)
    model.lm_head.weight.data *= 1e7
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    argv = ["evaluate", "--model", str(tmp_path), "--data", text_file, "--lengths", "32"]
    assert main([*argv, "--max-tokens", "100"]) == 0
    _, row, last = capsys.readouterr().out.splitlines()
    assert row.split()[2] == "inf"

    def refuse(constant):
        raise AssertionError(constant)

    (result,) = json.loads(last, parse_constant=refuse)["results"]
    assert result["perplexity"] is None
    assert result["nats_per_token"] > 710


@pytest.fixture
def run_folder(model_folder, tmp_path):
    """A model in a folder whose record says what a test has it say."""
    folder = tmp_path / "run"
    shutil.copytree(model_folder, folder)

    def record(command="pretrain", conversations=None, **options):
        (folder / f"{command}.yaml").write_text(yaml.safe_dump(options))
        (folder / "run.json").write_text(json.dumps({"conversations": conversations or {}}))
        return folder

    return record


def evaluated(folder, capsys, *argv) -> tuple[list[str], dict]:
    assert main(["evaluate", "--model", str(folder), "--lengths", "16", *argv]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    return table, json.loads(last)


@pytest.fixture
def records(tmp_path) -> str:
    path = tmp_path / "records.jsonl"
    lines = [{"body": f"the lazy dog {i} " * 9, "text": "fox " * 20} for i in range(80)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


@pytest.mark.parametrize("split", ["validation", "all"])
def test_a_run_is_scored_on_what_it_held_out(run_folder, records, capsys, split):
    folder = run_folder(data=records, text_column="body", mixture=[])
    asked = ["--data", records, "--text-column", "body", "--split", split]
    _, expected = evaluated(folder, capsys, *asked)
    table, found = evaluated(folder, capsys, "--split", split)
    assert records in table[0]
    assert found["data"] == records
    for ours, theirs in zip(found["results"], expected["results"], strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    _, other = evaluated(folder, capsys, "--split", split, "--text-column", "text")
    assert other["results"][0]["nats_per_token"] != found["results"][0]["nats_per_token"]


def test_a_mixture_a_checkpoint_and_the_last_of_two_trainings(
    run_folder, records, text_file, capsys
):
    folder = run_folder(data="builtin", mixture=[f"{text_file}=1", f"{records}=2"])
    tokens = {}
    for data in (text_file, records):
        _, found = evaluated(folder, capsys, "--data", data)
        tokens[data] = found["results"][0]["tokens"] + 1
    _, mixed = evaluated(folder, capsys)
    assert mixed["results"][0]["tokens"] + 1 == sum(tokens.values())

    checkpoint = folder / "checkpoints/checkpoint-3"
    checkpoint.mkdir(parents=True)
    for path in [*folder.glob("*.json"), *folder.glob("*.safetensors")]:
        shutil.copy(path, checkpoint)
    assert evaluated(checkpoint, capsys)[1]["data"] == mixed["data"]
    run_folder("finetune", data=records)
    assert evaluated(folder, capsys)[1]["data"] == records


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"data": "gone.txt"}, "was trained on what cannot be read here ("),
        ({"data": "hub:a/b", "streaming": True}, "was trained on a stream of hub:a/b; name a text"),
        ({"data": "chats.jsonl", "conversations": {"train": 3}}, "was finetuned on conversations"),
        ({"data": [1]}, "pretrain.yaml is damaged: it names no data"),
    ],
)
def test_a_run_whose_text_cannot_be_had_asks_for_one(run_folder, capsys, record, words):
    assert main(["evaluate", "--model", str(run_folder(**record))]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_model_that_is_no_run_asks_for_a_text(model_folder, capsys):
    assert main(["evaluate", "--model", model_folder]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not say what it was trained on; name a text to score: --data" in line
    assert main(["evaluate", "--model", "no/such/folder"]) == 2
    assert "no model folder at 'no/such/folder'" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_dtype(run, model_folder, text_file, dtype):
    _, summary = run("--lengths", "32", "--dtype", dtype, "--split", "all", "--max-tokens", "500")
    assert summary["dtype"] == dtype.replace("auto", "float32")
    model = load_model(model_folder, dtype=dtype.replace("auto", "float32"))
    tokens = tokenize_documents(load_documents(text_file), load_tokenizer(model_folder))
    expected = perplexity(model, tokens, length=32, max_tokens=500, progress=False)
    assert summary["results"][0]["nats_per_token"] == expected.nats_per_token
