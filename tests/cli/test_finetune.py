"""`stablemask finetune` as a user calls it: what it prints, and one line for each mistake."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from stablemask.cli import main as cli
from stablemask.data import load_tokenizer

from .conftest import TEXT, save_model

QUICK = ["--steps", "4", "--context", "16", "--batch-size", "2", "--dtype", "float32"]


@pytest.fixture(scope="session")
def softmax_folder(tmp_path_factory) -> str:
    return save_model(tmp_path_factory.mktemp("softmax"), attention="softmax")


@pytest.fixture
def finetune(text_file, tmp_path, capfd):
    """Run the command; its exit code, and what it printed."""

    def run(model: str, *flags: str, data: str = text_file, out: str = "run"):
        words = ["--model", model, "--data", data, "--out", str(tmp_path / out), *QUICK, *flags]
        code = cli.main(["finetune", *words])
        return code, *capfd.readouterr()

    return run


def test_adapts_and_says_what_it_came_to(finetune, softmax_folder, tmp_path):
    flags = ["--adapt", "--texts", "4", "--no-tensorboard"]
    code, stdout, stderr = finetune(softmax_folder, *flags)
    assert code == 0
    assert "4 steps, validation perplexity" in stdout
    assert "step 0: validation perplexity" in stderr
    assert "\n| attention on the first token | " in stderr
    assert json.loads((tmp_path / "run" / "config.json").read_text())["attention"] == "stablemask"
    code, stdout, stderr = finetune(softmax_folder, *flags, "--resume")
    assert code == 0
    assert "4 steps" in stdout


def test_a_model_made_worse_is_one_line_and_exit_code_1(finetune, softmax_folder, tmp_path):
    flags = ["--learning-rate", "3", "--warmup", "0", "--no-tensorboard"]
    for resume in ([], ["--resume"]):
        code, stdout, stderr = finetune(softmax_folder, *flags, *resume)
        assert (code, stdout) == (1, "")
        assert stderr.splitlines()[-1].startswith("stablemask: error: ")
        assert "has harmed the model" in stderr.splitlines()[-1]
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_dry_run(finetune, softmax_folder, tmp_path):
    code, stdout, _ = finetune(softmax_folder, "--adapt", "--dry-run")
    assert code == 0
    assert "\nprefix " in stdout
    assert "tokens that the model writes itself" in stdout
    assert not (tmp_path / "run").exists()


def test_no_other_flag_is_needed_to_adapt(softmax_folder, tmp_path, capfd):
    """But that of a dry run, for 400 steps take long."""
    words = ["--model", softmax_folder, "--adapt", "--out", str(tmp_path / "run")]
    assert cli.main(["finetune", *words, "--dry-run"]) == 0
    assert "training    400 steps of 4" in capfd.readouterr()[0]


def edited(folder: str, copy: Path, change) -> str:
    shutil.copytree(folder, copy)
    change(copy)
    return str(copy)


def with_other_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens(["jumps over", "lazy dog"])
    tokenizer.save_pretrained(folder)


def as_adapter(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "m"}')


def as_bloom(folder: Path) -> None:
    size = len(load_tokenizer(str(folder)))
    (folder / "generation_config.json").unlink()
    BloomForCausalLM(
        BloomConfig(vocab_size=size, hidden_size=32, n_layer=1, n_head=4)
    ).save_pretrained(folder)


def with_few_positions(folder: Path) -> None:
    size = len(load_tokenizer(str(folder)))
    (folder / "generation_config.json").unlink()
    config = GPT2Config(vocab_size=size, n_positions=8, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "flags", "words"),
    [
        (with_other_tokenizer, [], "outside the model's vocabulary"),
        (as_adapter, [], "is an adapter; merge it"),
        (as_bloom, ["--adapt", "--gamma", "0.1"], "cannot be adapted"),
        (with_few_positions, [], "learned position table"),
    ],
)
def test_a_model_that_will_not_do(change, flags, words, finetune, softmax_folder, tmp_path):
    code, stdout, stderr = finetune(edited(softmax_folder, tmp_path / "m", change), *flags)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert words in stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gamma", "0.1"], "gamma goes with --adapt"),
        (["--start", "1"], "start goes with --adapt"),
        (["--texts", "2"], "texts goes with --adapt"),
        (["--lora-rank", "4"], "lora_rank goes with --lora"),
        (["--merge"], "merge goes with --lora"),
        (["--lora", "--lora-rank", "0"], "lora_rank must be at least 1"),
        (["--adapt", "--start", "-1"], "start must be at least 0"),
        (["--adapt", "--texts", "1"], "texts must be 0, or at least 2"),
        (["--adapt", "--gamma", "0"], "stablemask['gamma'] must be greater than 0"),
        (["--adapt", "--compile"], "compile does not go with adapt"),
        (["--adapt", "--fsdp"], "fsdp does not go with adapt"),
        (["--adapt", "--horizon", "1"], "leave no row a pseudo mass"),
        (["--learning-rate", "0"], "learning_rate"),
        (["--context", "1"], "context must be at least 2"),
        (["--context", "99999"], "do not fill a block"),
        (["--resume"], "holds no run to resume"),
    ],
)
def test_a_bad_option(flags, words, finetune, softmax_folder, tmp_path):
    code, stdout, stderr = finetune(softmax_folder, *flags)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert words in stderr
    assert not (tmp_path / "run").exists()


def test_data_is_only_optional_to_adapt(softmax_folder, tmp_path, capfd):
    words = ["finetune", "--model", softmax_folder, "--out", str(tmp_path / "run"), *QUICK]
    for more, said in (
        ([], "data must be given: --data"),
        (["--adapt", "--texts", "0"], "with texts 0 the data is all there is"),
    ):
        assert cli.main([*words, *more]) == 2
        assert said in capfd.readouterr()[1]


def test_a_model_that_has_stablemask_is_not_adapted_again(finetune, model_folder):
    code, _, stderr = finetune(model_folder, "--adapt")
    assert code == 2
    assert "is no softmax model to adapt" in stderr


def test_bad_data(finetune, softmax_folder, tmp_path):
    chats = tmp_path / "chats.jsonl"
    chat = {"messages": [{"role": "user", "content": TEXT[:44]}, {"role": "narrator"}]}
    for content, words in (
        (json.dumps(chat), "has no chat template"),
        ("{", "not a JSON record"),
        (json.dumps({"body": "text"}), "no column 'text'"),
        ("", "holds no text"),
    ):
        chats.write_text(content)
        code, stdout, stderr = finetune(softmax_folder, data=str(chats))
        assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
        assert words in stderr
    for model in ("", "/no/such/model", str(chats)):
        code, _, stderr = finetune(model)
        assert (code, stderr.count("\n")) == (2, 1)
    code, _, stderr = finetune(softmax_folder, data="/no/such/data.jsonl")
    assert code == 2
    assert "no file or folder" in stderr
