"""`stablemask generate`, on a saved model."""

import json
import shutil
from pathlib import Path

import pytest

from stablemask.cli import generate as command
from stablemask.cli.main import main
from stablemask.data import load_tokenizer
from stablemask.hf.loading import load_model
from stablemask.inference import generate

PROMPTS = ["the quick", "brown fox"]


@pytest.fixture
def run(model_folder, capsys):
    def run(*argv: str) -> str:
        assert main(["generate", "--model", model_folder, "--max-new-tokens", "8", *argv]) == 0
        return capsys.readouterr().out

    return run


def expected(folder: str, prompts: list[str], **settings) -> str:
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    texts = generate(model, tokenizer, prompts, max_new_tokens=8, **settings)
    return "".join(f"{prompt}{text}\n" for prompt, text in zip(prompts, texts, strict=True))


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_prompts_and_their_continuations(run, model_folder, stream):
    assert run("--prompt", *PROMPTS, *stream) == expected(model_folder, PROMPTS)


def test_sampling(run, model_folder):
    argv = ["--prompt", "the", "--temperature", "1.2", "--top-p", "0.9", "--top-k", "20"]
    settings = {"temperature": 1.2, "top_p": 0.9, "top_k": 20}
    sample = run(*argv, "--seed", "1")
    assert sample == expected(model_folder, ["the"], seed=1, **settings)
    assert run(*argv, "--seed", "1", "--stream") == sample
    assert run(*argv, "--seed", "2") != sample


@pytest.mark.parametrize("argv", [[], ["--temperature", "1.5", "--seed", "3"]])
def test_a_window(run, model_folder, argv):
    settings = {"temperature": 1.5, "seed": 3} if argv else {}
    windowed = expected(model_folder, ["the quick"], window=4, **settings)
    for stream in ([], ["--stream"]):
        assert run("--prompt", "the quick", "--window", "4", *stream, *argv) == windowed
    assert windowed != expected(model_folder, ["the quick"], **settings)


def test_an_endless_stream_ends_with_its_reader(model_folder, monkeypatch, capsys):
    """As Ctrl-C does; whatever came before is on the screen."""
    said = []

    def listen(*texts, **_):
        said.extend(texts)
        if len(said) == 50:
            raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", listen)
    argv = ["--prompt", "the", "--window", "8", "--max-new-tokens", "none", "--stream"]
    argv += ["--temperature", "2", "--seed", "0"]
    assert main(["generate", "--model", model_folder, *argv]) == 130
    assert said[0].startswith("the")
    assert said[50:] == ["stablemask: interrupted"]


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture
def chat_folder(model_folder, tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(model_folder, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return str(folder)


def test_a_chat_prints_the_answer_alone(chat_folder, capsys):
    argv = ["--model", chat_folder, "--max-new-tokens", "8"]
    answers = expected(chat_folder, ["<user>the quick<assistant>"]).partition("<assistant>")[2]
    for stream in ([], ["--stream"]):
        assert main(["generate", *argv, "--prompt", "the quick", "--chat", *stream]) == 0
        assert capsys.readouterr().out == answers


@pytest.fixture
def batch(model_folder, tmp_path, capsys):
    """Answers a file of seven prompts, two at a time, into a file that it returns."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the quick\nbrown\n\nfox jumps\nover\nthe lazy dog\nthe\ndog\n")

    def batch(name: str, *argv: str, code: int = 0) -> Path:
        out = tmp_path / name
        files = ["--prompts", str(prompts), "--out", str(out), "--batch-size", "2"]
        argv = ("--model", model_folder, "--max-new-tokens", "8", *files, *argv)
        assert main(["generate", *argv]) == code
        return out

    return batch


def test_a_file_of_prompts(batch, model_folder, capsys):
    lines = batch("out.jsonl").read_text().splitlines()
    assert capsys.readouterr().out.endswith("out.jsonl, 7 of them new\n")
    records = [json.loads(line) for line in lines]
    for pair in (records[:2], records[2:4], records[4:6], records[6:]):
        together = [record["prompt"] for record in pair]
        shown = "".join(f"{r['prompt']}{r['generated_text']}\n" for r in pair)
        assert shown == expected(model_folder, together)
    assert [record["prompt"] for record in records[2:4]] == ["fox jumps", "over"]


@pytest.mark.parametrize("argv", [[], ["--temperature", "1.5", "--seed", "3"], ["--window", "4"]])
def test_a_run_that_was_stopped_ends_in_the_same_file(batch, monkeypatch, capsys, argv):
    whole = batch("whole.jsonl", *argv).read_bytes()
    assert whole.count(b"\n") == 7

    calls = []

    def stop_at_the_third(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(command, "generate", stop_at_the_third)
        out = batch("out.jsonl", *argv, code=130)
    assert out.read_bytes().count(b"\n") == 4
    out.write_bytes(out.read_bytes()[:-10])  # and the machine went down while it wrote
    capsys.readouterr()
    assert batch("out.jsonl", "--resume", *argv).read_bytes() == whole
    assert capsys.readouterr().out.endswith("out.jsonl, 4 of them new\n")
    # Nothing is left to do, and no model is loaded for it.
    assert batch("out.jsonl", "--resume", "--model", "no/such/folder", *argv).read_bytes() == whole


def test_a_file_of_answers_is_not_overwritten(batch, capsys):
    out = batch("out.jsonl")
    answers = out.read_bytes()
    batch("out.jsonl", code=2)
    assert "exists; go on with it by --resume" in capsys.readouterr().err
    assert out.read_bytes() == answers


def test_a_prompt_of_the_file_that_is_too_long(learned_folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("fox\n" + "the quick brown fox " * 30 + "\n\ndog\n")
    out = tmp_path / "out.jsonl"
    argv = ["--model", learned_folder, "--prompts", str(prompts), "--out", str(out)]
    assert main(["generate", *argv, "--max-new-tokens", "4"]) == 2
    assert "prompts.txt', line 2: the prompt of" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prompt", "a", "--model", "no/such/folder"], "no/such/folder"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature must be 0"),
        (["--prompt", "a", "--top-p", "0.5"], "need a temperature above 0"),
        (["--prompt", "a", "--device", "abacus"], "device 'abacus' cannot be used here"),
        ([], "give either --prompt, some text, or --prompts, a file of them"),
        (["--prompt", "a", "--prompts", "b.txt"], "give either --prompt"),
        (["--prompts", "no.txt"], "--prompts needs --out"),
        (["--prompts", "no.txt", "--out", "b"], "cannot read 'no.txt': No such file"),
        (["--prompts", "a.txt", "--out", "b", "--stream"], "--prompts writes to --out"),
        (["--prompts", "no.txt", "--out", "."], "cannot read 'no.txt'"),
        (
            ["--prompts", "a.txt", "--out", "b", "--batch-size", "0"],
            "batch_size must be at least 1, got",
        ),
        (["--prompt", "a", "--out", "b"], "--out and --resume belong to --prompts"),
        (["--prompt", "a", "--resume"], "--out and --resume belong to --prompts"),
        (["--prompt", "a\udcff"], "the prompt is not valid Unicode: surrogates not allowed"),
        (
            ["--prompt", "a", "--temperature", "1", "--seed", str(1 << 64)],
            "seed must be a number of 64 bits, got 18446744073709551616",
        ),
        (["--prompt", "a", "--chat"], "the tokenizer has no chat template"),
        (["--prompt", "a", "--window", "1"], "window must be at least 2, got 1"),
        (["--prompt", "a", "--max-new-tokens", "none"], "needs --stream"),
        (
            ["--prompt", "a", "--max-new-tokens", "none", "--stream"],
            "max_new_tokens may be none with a window only",
        ),
    ],
)
def test_bad_input(model_folder, capsys, argv, words):
    assert main(["generate", "--model", model_folder, *argv]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    error = output.err.splitlines()[-1]
    assert error.startswith("stablemask: error: ")
    assert words in error


@pytest.mark.parametrize("stream", [["--stream"], []])
def test_a_prompt_longer_than_a_learned_table(learned_folder, capsys, stream):
    prompt = "the quick brown fox " * 30
    assert main(["generate", "--model", learned_folder, "--prompt", prompt, *stream]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    count = len(load_tokenizer(learned_folder)(prompt)["input_ids"])
    assert f"prompt of {count} tokens" in output.err
    assert "table has 32" in output.err
