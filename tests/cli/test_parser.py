"""Options from flags and from YAML: every type, who wins, and what a mistake says."""

import os
import subprocess
import sys
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest

from stablemask.cli.main import main
from stablemask.cli.parser import parse_options
from stablemask.errors import InputError
from stablemask.options import command_words, load_yaml, option, save_yaml
from tests import marks


@dataclass(kw_only=True)
class Options:
    """A test."""

    model: str = option(MISSING, "which model")
    max_new_tokens: int = option(64, "how many, at most 100% of the context", group="text")
    temperature: float = option(0.0, "heat")
    stream: bool = option(False, "print as it comes")
    cache: bool = option(True, "keep keys")
    horizon: int | None = option(None, "columns")
    gamma: float | Literal["slopes"] | None = option(None, "decay rate")
    position: str = option("rope", "encoding", choices=["rope", "alibi"])
    out: Path = option(Path("runs"), "folder", group="files")
    prompt: list[str] = option([], "texts")
    lengths: list[int] = option([1, 2], "lengths")
    dtypes: list[str] | None = option(None, "precisions", choices=["float32", "bfloat16"])
    tokenizer: str | None = option(None, "which tokenizer")


@dataclass(kw_only=True)
class Positional:
    adapter: str = option(MISSING, "which adapter", positional=True)
    out: Path = option(MISSING, "folder")


@dataclass(kw_only=True)
class Several:
    runs: list[str] = option([], "which runs", positional=True, choices=["a", "b"])
    seeds: int = option(1, "how many")


def parse(*argv: str) -> Options:
    return parse_options(Options, argv, prog="stablemask test")


def parse_yaml(tmp_path: Path, text: str, *argv: str) -> Options:
    config = tmp_path / "config.yaml"
    config.write_text(text)
    return parse("--config", str(config), *argv)


def test_defaults_are_those_of_the_dataclass_and_not_shared():
    Options(model="m").prompt.append("x")
    assert parse("--model", "m") == Options(model="m")
    assert Options(model="m").prompt == []


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--max-new-tokens", "3"], "max_new_tokens", 3),
        (["--temperature", "1e-4"], "temperature", 1e-4),
        (["--temperature", "2"], "temperature", 2.0),
        (["--stream"], "stream", True),
        (["--no-stream"], "stream", False),
        (["--no-cache"], "cache", False),
        (["--horizon", "256"], "horizon", 256),
        (["--horizon", "none"], "horizon", None),
        (["--gamma", "0.5"], "gamma", 0.5),
        (["--gamma", "-1"], "gamma", -1.0),
        (["--gamma=-1e-5"], "gamma", -1e-5),
        (["--gamma", "slopes"], "gamma", "slopes"),
        (["--position", "alibi"], "position", "alibi"),
        (["--out", "a/b"], "out", Path("a/b")),
        (["--out=~/a"], "out", Path.home() / "a"),
        (["--prompt", "a b", "c", "--prompt", "d"], "prompt", ["a b", "c", "d"]),
        (["--prompt=- a", "--prompt=-b", "--prompt", "c"], "prompt", ["- a", "-b", "c"]),
        (["--lengths", "4", "8"], "lengths", [4, 8]),
        (["--dtypes", "bfloat16"], "dtypes", ["bfloat16"]),
        (["--tokenizer", "gpt2"], "tokenizer", "gpt2"),
        (["--tokenizer", "none"], "tokenizer", None),
    ],
)
def test_flags_and_the_words_that_give_them_again(argv, name, value):
    parsed = parse("--model", "m", *argv)
    assert getattr(parsed, name) == value
    assert type(getattr(parsed, name)) is type(value)
    assert parse(*command_words(parsed)) == parsed
    assert command_words(replace(parsed, tokenizer="t"), without=["tokenizer", name]) == [
        "--model",
        "m",
    ]


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
    assert parse_yaml(tmp_path, "", "--model", "m") == Options(model="m")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--model must be given; see `stablemask test --help`"),
        (
            ["--max-new-tokens", "1.5"],
            "argument --max-new-tokens: '1.5' is not a whole number; see ",
        ),
        (["--position", "nope"], "--position: 'nope' is not one of rope, alibi; see "),
        (["--dtypes", "float32", "int8"], "--dtypes: 'int8' is not one of float32, bfloat16"),
        (["--gamma", "steep"], "--gamma: 'steep' is not a number or one of slopes or none"),
        (["--horizon", "many"], "--horizon: 'many' is not a whole number or none"),
        (["more"], "unrecognized arguments: more; see `stablemask test --help`"),
        (["--max-new-token", "3"], "--max-new-token 3; did you mean --max-new-tokens?"),
        (["--max_new_tokens=3"], "--max_new_tokens=3; did you mean --max-new-tokens?"),
        (["--out"], "argument --out: expected one argument; see "),
    ],
)
def test_wrong_flags_are_one_sentence_that_names_them(argv, words):
    with pytest.raises(InputError) as error:
        parse(*(argv and ["--model", "m", *argv]))
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modle: m", "unknown option 'modle'; did you mean model?"),
        ("zzz: m", "unknown option 'zzz'; the options are model, max_new_tokens, "),
        ("model: m\nmax-new-tokens: many", "max-new-tokens: 'many' is not a whole number"),
        ("model: m\nmax-new-tokens: '3'", "max-new-tokens: '3' is not a whole number"),
        ("model: m\nmax-new-tokens: true", "max-new-tokens: True is not a whole number"),
        ("model: m\nmax-new-tokens: 1.5", "max-new-tokens: 1.5 is not a whole number"),
        ("model: m\nstream: 1", "stream: 1 is not true or false"),
        ("model: m\ntemperature: hot", "temperature: 'hot' is not a number"),
        ("model: no", "model: False is not text"),
        ("model: m\nposition: nope", "position: 'nope' is not one of rope, alibi"),
        ("model: m\nlengths: [1, x]", "lengths: [1, 'x'] is not a list, each item a whole number"),
        ("stream: no\nmodel: m\nmodel: n", "the option 'model' is given twice"),
        ("max_new_tokens: 1\nmax-new-tokens: 2", "the option 'max_new_tokens' is given twice"),
        ("- model", "holds no options"),
        ("model: [", "not valid YAML"),
        ("[" * 1500, "nested too deep"),
        ("model: 2024-13-45", "not valid YAML: month must be in 1..12"),
        ("model: !!bool maybe", "not valid YAML: 'maybe'"),
        ("model: !!int ''", "not valid YAML: string index out of range"),
        ("model: !!timestamp x", "not valid YAML: "),
        (f"temperature: {10**400}", "00000 is not a number"),
    ],
)
def test_wrong_yaml_names_the_file_and_the_key(tmp_path, text, words):
    with pytest.raises(InputError) as error:
        parse_yaml(tmp_path, text)
    assert "config.yaml" in str(error.value)
    assert words in str(error.value)


def test_yaml_that_cannot_be_read(tmp_path):
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    (tmp_path / "loop").symlink_to("loop")
    for name, words in {
        "absent": "cannot read '.*absent': No such file",
        "loop": "cannot read '.*loop': Too many levels",
        "binary/x": "cannot read .*: Not a directory",
        "n" * 300: "cannot read .*: File name too long",
        ".": "cannot read .*: Is a directory",
        "binary": "binary is not valid YAML",
    }.items():
        with pytest.raises(InputError, match=words):
            load_yaml(tmp_path / name)


def test_help_tells_groups_defaults_choices_and_requirements(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse("--help")
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.startswith("usage: stablemask test --model TEXT [options] A test. options: -h")
    for words in [
        "--config FILE YAML file of options; flags win over it --model TEXT which model (required) text: ",
        " text: --max-new-tokens N how many, at most 100% of the context (default: 64)",
        "--stream, --no-stream print as it comes --cache, --no-cache keep keys (default: on) --horizon",
        "--gamma X|slopes decay rate",
        "--position rope|alibi encoding (default: rope) files: --out PATH",
        "--lengths N [N ...] lengths (default: 1 2)",
    ]:
        assert words in text, words


@pytest.mark.parametrize("argv", [["a", "--out", "o"], ["--out", "o", "a"]])
def test_a_single_value_may_stand_without_a_flag(argv):
    assert parse_options(Positional, argv) == Positional(adapter="a", out=Path("o"))


def test_a_single_value_without_a_flag_is_required_and_one(capsys):
    with pytest.raises(InputError, match=r"^ADAPTER and --out must be given"):
        parse_options(Positional, [])
    with pytest.raises(InputError, match="unrecognized arguments: b"):
        parse_options(Positional, ["a", "b", "--out", "o"])
    with pytest.raises(SystemExit):
        parse_options(Positional, ["--help"], prog="stablemask merge")
    assert "usage: stablemask merge --out PATH [options] ADAPTER\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "runs"),
    [([], []), (["--seeds", "2"], []), (["b", "--seeds", "2", "a"], ["b", "a"])],
)
def test_several_values_may_stand_without_a_flag(argv, runs, capsys):
    parsed = parse_options(Several, argv)
    assert parsed.runs == runs
    assert parse_options(Several, command_words(parsed)) == parsed
    with pytest.raises(InputError, match="'c' is not one of a, b"):
        parse_options(Several, [*argv, "c"])
    with pytest.raises(SystemExit):
        parse_options(Several, ["--help"], prog="p")
    assert "usage: p [options] [a|b ...]\n" in capsys.readouterr().out


def test_saved_options_read_back_equal_and_a_save_that_fails_leaves_the_old_file(tmp_path):
    options = Options(
        model="yes",  # a boolean to YAML unless it is quoted
        temperature=1e-7,
        gamma="slopes",
        prompt=["ä: b\n", "- c"],
        out="x y",  # type: ignore[arg-type]
        tokenizer="12",
    )
    path = tmp_path / "saved.yaml"
    save_yaml(options, path)
    with pytest.raises(Exception, match="represent"):
        save_yaml(Options(model=object()), path)  # type: ignore[arg-type]
    assert parse("--config", str(path)) == replace(options, out=Path("x y"))
    assert [path.name for path in tmp_path.iterdir()] == ["saved.yaml"]


def test_a_shell_that_completes_is_told_every_command_and_flag(monkeypatch):
    def autocomplete(parser):
        (commands,) = parser._subparsers._group_actions
        assert {"pretrain", "serve"} < set(commands.choices)
        flags = commands.choices["pretrain"]._option_string_actions
        assert {"--config", "--learning-rate", "--no-compile"} < set(flags)
        assert "alibi" in flags["--position"].choices
        sys.exit(0)

    monkeypatch.setenv("_ARGCOMPLETE", "1")
    monkeypatch.setitem(sys.modules, "argcomplete", SimpleNamespace(autocomplete=autocomplete))
    with pytest.raises(SystemExit):
        main([])


@marks.argcomplete
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("stablemask pre", ["pretrain "]),
        ("stablemask pretrain --wa", ["--warmup", "--wandb"]),
        ("stablemask pretrain --attention so", ["softmax", "softmax1"]),
    ],
)
def test_what_a_shell_offers(typed, offered, tmp_path):
    """As the function of ``register-python-argcomplete`` asks for it."""
    told = tmp_path / "told"
    asked = {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(told),
        "COMP_LINE": typed, "COMP_POINT": str(len(typed)),
    }  # fmt: skip
    command = [sys.executable, "-m", "stablemask"]
    subprocess.run(command, env=os.environ | asked, check=True, stdout=subprocess.DEVNULL)
    assert told.read_text().split("\n") == offered
