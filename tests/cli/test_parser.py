"""Options from flags and from YAML: every type, who wins, and what a mistake says."""

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

import pytest

from stablemask.cli.parser import parse_options
from stablemask.errors import InputError
from stablemask.options import load_yaml, option, save_yaml
from stablemask.training.options import FinetuneOptions, PretrainOptions


@dataclass(kw_only=True)
class Options:
    model: str = option(MISSING, "which model")
    max_new_tokens: int = option(64, "how many, at most 100% of the context")
    temperature: float = option(0.0, "heat")
    stream: bool = option(False, "print as it comes")
    horizon: int | None = option(None, "columns")
    gamma: float | Literal["slopes"] | None = option(None, "decay rate")
    position: str = option("rope", "encoding", choices=["rope", "alibi"])
    precision: Literal["float32", "bfloat16"] = option("float32", "dtype")
    out: Path = option(Path("runs"), "folder")
    prompt: list[str] = option([], "texts")
    lengths: list[int] = option([1, 2], "lengths")
    tokenizer: str | None = option(None, "which tokenizer")


def parse(*argv: str) -> Options:
    return parse_options(Options, argv, prog="stablemask test", description="A test.")


def parse_yaml(tmp_path: Path, text: str, *argv: str) -> Options:
    config = tmp_path / "config.yaml"
    config.write_text(text)
    return parse("--config", str(config), *argv)


def test_defaults_are_those_of_the_dataclass():
    assert parse("--model", "m") == Options(model="m")


def test_list_defaults_are_not_shared():
    Options(model="m").prompt.append("x")
    assert Options(model="m").prompt == []


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--max-new-tokens", "3"], "max_new_tokens", 3),
        (["--temperature", "1e-4"], "temperature", 1e-4),
        (["--temperature", "2"], "temperature", 2.0),
        (["--stream"], "stream", True),
        (["--no-stream"], "stream", False),
        (["--horizon", "256"], "horizon", 256),
        (["--horizon", "none"], "horizon", None),
        (["--gamma", "0.5"], "gamma", 0.5),
        (["--gamma", "-1"], "gamma", -1.0),
        (["--gamma", "slopes"], "gamma", "slopes"),
        (["--position", "alibi"], "position", "alibi"),
        (["--precision", "bfloat16"], "precision", "bfloat16"),
        (["--out", "a/b"], "out", Path("a/b")),
        (["--prompt", "a b", "c", "--prompt", "d"], "prompt", ["a b", "c", "d"]),
        (["--lengths", "4", "8"], "lengths", [4, 8]),
        (["--tokenizer", "gpt2"], "tokenizer", "gpt2"),
        (["--tokenizer", "none"], "tokenizer", None),
    ],
)
def test_flags(argv, name, value):
    parsed = getattr(parse("--model", "m", *argv), name)
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("max-new-tokens: 3", "max_new_tokens", 3),
        ("max_new_tokens: 3", "max_new_tokens", 3),
        ("temperature: 1e-4", "temperature", 1e-4),  # text to YAML 1.1
        ("temperature: 2", "temperature", 2.0),
        ("stream: yes", "stream", True),
        ("horizon: null", "horizon", None),
        ("gamma: slopes", "gamma", "slopes"),
        ("out: a/b", "out", Path("a/b")),
        ("prompt: [a, b]", "prompt", ["a", "b"]),
        ("prompt: a", "prompt", ["a"]),
        ("tokenizer: 12", "tokenizer", "12"),
    ],
)
def test_yaml(tmp_path, text, name, value):
    parsed = getattr(parse_yaml(tmp_path, f"model: m\n{text}\n"), name)
    assert parsed == value
    assert type(parsed) is type(value)


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    text = "model: m\nmax-new-tokens: 3\nstream: true\ntemperature: 0.5\n"
    parsed = parse_yaml(tmp_path, text, "--max-new-tokens", "5", "--no-stream")
    assert (parsed.max_new_tokens, parsed.stream, parsed.temperature) == (5, False, 0.5)


def test_empty_file_gives_nothing(tmp_path):
    assert parse_yaml(tmp_path, "", "--model", "m") == Options(model="m")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], ["--model", "must be given"]),
        (["--model", "m", "--max-new-tokens", "x"], ["--max-new-tokens", "'x'", "whole number"]),
        (["--model", "m", "--max-new-tokens", "1.5"], ["--max-new-tokens", "whole number"]),
        (["--model", "m", "--position", "nope"], ["--position", "'nope'", "rope, alibi"]),
        (["--model", "m", "--precision", "int8"], ["--precision", "'int8'", "float32, bfloat16"]),
        (["--model", "m", "--gamma", "steep"], ["--gamma", "a number or one of slopes or none"]),
        (["--model", "m", "--max-new", "3"], ["--max-new"]),  # no abbreviations
        (["--model", "m", "more"], ["more"]),
        (["--model"], ["--model"]),
    ],
)
def test_wrong_flags_are_one_sentence_that_names_them(argv, words):
    with pytest.raises(InputError) as error:
        parse(*argv)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "stablemask test --help" in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modle: m", ["'modle'", "max_new_tokens"]),
        ("model: m\nmax-new-tokens: many", ["max-new-tokens", "'many'", "whole number"]),
        ("model: m\nmax-new-tokens: true", ["max-new-tokens", "whole number"]),
        ("model: m\nmax-new-tokens: 1.5", ["max-new-tokens", "whole number"]),
        ("model: m\nstream: 1", ["stream", "true or false"]),
        ("model: m\ntemperature: hot", ["temperature", "a number"]),
        ("model: no", ["model", "text"]),
        ("model: m\nposition: nope", ["position", "rope, alibi"]),
        ("model: m\nlengths: [1, x]", ["lengths", "a list, each item a whole number"]),
        ("model: m\nlengths: x", ["lengths", "a list"]),
        ("max_new_tokens: 1\nmax-new-tokens: 2", ["max_new_tokens", "twice"]),
        ("- model", ["no options"]),
        ("model: [", ["not valid YAML"]),
        ("model: m\nlengths", ["not valid YAML"]),
    ],
)
def test_wrong_yaml_names_the_file_and_the_key(tmp_path, text, words):
    with pytest.raises(InputError) as error:
        parse_yaml(tmp_path, text)
    assert all(word in str(error.value) for word in ["config.yaml", *words]), str(error.value)


def test_missing_binary_and_folder_as_config(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    for name, words in [("absent", "no such file"), ("binary", "not valid YAML"), (".", "folder")]:
        with pytest.raises(InputError, match=words):
            parse("--config", str(tmp_path / name))


def test_help_tells_defaults_choices_and_requirements(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse("--help")
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in [
        "--model TEXT which model (required)",
        "--max-new-tokens N how many, at most 100% of the context (default: 64)",
        "--stream, --no-stream print as it comes --horizon",
        "--lengths N [N ...] lengths (default: 1 2)",
        "--position {rope,alibi}",
        "--precision float32|bfloat16",
        "--gamma X|slopes decay rate",
        "--out PATH",
        "--config FILE",
    ]:
        assert words in text, words


def test_saved_options_read_back_equal(tmp_path):
    options = Options(
        model="yes",  # a boolean to YAML unless it is quoted
        temperature=1e-7,
        gamma="slopes",
        prompt=["ä: b\n", "- c"],
        out=Path("x y"),
        tokenizer="12",
    )
    save_yaml(options, tmp_path / "saved.yaml")
    assert parse("--config", str(tmp_path / "saved.yaml")) == options
    assert [path.name for path in tmp_path.iterdir()] == ["saved.yaml"]


def test_a_save_that_fails_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "saved.yaml"
    save_yaml(Options(model="old"), path)
    with pytest.raises(Exception, match="represent"):
        save_yaml(Options(model=object()), path)  # type: ignore[arg-type]
    assert load_yaml(path)["model"] == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["saved.yaml"]


@pytest.mark.parametrize(
    ("options", "argv", "words"),
    [
        (PretrainOptions, ["--gamma", "fast"], "'fast' is not a number or one of slopes, learned"),
        (PretrainOptions, ["--hold", "soon"], "'soon' is not a whole number or one of never"),
        (FinetuneOptions, ["--gamma", "learned"], "'learned' is not a number or one of slopes or"),
        (FinetuneOptions, ["--hold", "1.5"], "'1.5' is not a whole number or one of never"),
    ],
)
def test_a_training_option_that_takes_numbers_and_names_names_them_all(options, argv, words):
    with pytest.raises(InputError) as caught:
        parse_options(options, argv)
    assert words in str(caught.value)


def test_yaml_that_cannot_be_read(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    for name, words in {
        "loop": "cannot read .*loop: Too many levels",
        "deep.yaml/x": "cannot read .*: Not a directory",
        "n" * 300: "cannot read .*: File name too long",
        "deep.yaml": "nested too deep",
        ".": "is a folder",
    }.items():
        with pytest.raises(InputError, match=words):
            load_yaml(tmp_path / name)


@dataclass(kw_only=True)
class Positional:
    adapter: str = option(MISSING, "which adapter", positional=True)
    out: Path = option(MISSING, "folder")


@pytest.mark.parametrize("argv", [["a", "--out", "o"], ["--out", "o", "a"]])
def test_a_single_value_may_stand_without_a_flag(argv):
    assert parse_options(Positional, argv) == Positional(adapter="a", out=Path("o"))


def test_a_single_value_without_a_flag_is_required_and_one(capsys):
    with pytest.raises(InputError, match=r"^ADAPTER and --out must be given"):
        parse_options(Positional, [])
    with pytest.raises(InputError, match="b"):
        parse_options(Positional, ["a", "b", "--out", "o"])
    with pytest.raises(SystemExit):
        parse_options(Positional, ["--help"], prog="stablemask merge")
    assert "stablemask merge [options] ADAPTER" in capsys.readouterr().out
