"""`stablemask generate`, on a saved model."""

import shutil

import pytest

from stablemask.cli.main import main
from stablemask.data import load_tokenizer
from stablemask.hf.loading import load_model
from stablemask.inference import generate

from .test_main import stablemask

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


def test_prompts_and_their_continuations(run, model_folder):
    assert run("--prompt", *PROMPTS) == expected(model_folder, PROMPTS)


def test_streaming_shows_the_same_text(run):
    assert run("--prompt", *PROMPTS, "--stream") == run("--prompt", *PROMPTS)


def test_sampling(run, model_folder):
    argv = ["--prompt", "the", "--temperature", "1.2", "--top-p", "0.9", "--top-k", "20"]
    settings = {"temperature": 1.2, "top_p": 0.9, "top_k": 20}
    for seed in (1, 2):
        sample = run(*argv, "--seed", str(seed))
        assert sample == expected(model_folder, ["the"], seed=seed, **settings)
        assert run(*argv, "--seed", str(seed), "--stream") == sample


def test_config_file(run, tmp_path):
    config = tmp_path / "generate.yaml"
    config.write_text("prompt: the quick\nmax-new-tokens: 3\n")
    assert run("--config", str(config)) == run("--prompt", "the quick")


def test_as_a_user_types_it(model_folder):
    result = stablemask("generate", "--model", model_folder, "--prompt", "the", "--stream")
    assert result.returncode == 0
    assert result.stdout.startswith("the")
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--prompt", "a", "--model", "no/such/folder"], "no/such/folder"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens must be at least 1, got 0"),
        (["--prompt", "a", "--temperature", "-1"], "temperature must be 0"),
        (["--prompt", "a", "--temperature", "hot"], "--temperature: 'hot' is not a number"),
        (["--prompt", "a", "--top-p", "0.5"], "need a temperature above 0"),
        (["--prompt", "a", "--device", "abacus"], "device 'abacus' cannot be used here"),
        ([], "--prompt must be given"),
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


@pytest.fixture
def damaged_folder(model_folder, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(model_folder, folder)

    def damage(name: str) -> str:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        return str(folder)

    return damage


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_damaged_folder(damaged_folder, capsys, name):
    folder = damaged_folder(name)
    assert main(["generate", "--model", folder, "--prompt", "the"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines()[-1].startswith("stablemask: error: ")
    assert folder in output.err.splitlines()[-1]


def test_a_damaged_folder_is_one_line_to_a_user(damaged_folder):
    folder = damaged_folder("tokenizer.json")
    result = stablemask("generate", "--model", folder, "--prompt", "the")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("stablemask: error: ")
    assert result.stderr.count("\n") == 1
