"""Continue prompts with a trained model, greedily or by sampling: some, a file of them, or a stream."""

from collections.abc import Callable
from dataclasses import MISSING, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stablemask.cli.models import device_option, dtype_option, load
from stablemask.data import load_tokenizer
from stablemask.errors import InputError
from stablemask.inference import generate
from stablemask.inference.batch import answer_prompts, open_answers, read_prompts, refuse_lines
from stablemask.inference.generate import check_chat_template, check_settings, encode_prompt
from stablemask.options import option
from stablemask.writing import only_writer

SUMMARY = "continue prompts with a trained model"


@dataclass(kw_only=True)
class GenerateOptions:
    model: str = option(MISSING, "folder or hub name of the model")
    prompt: list[str] = option([], "text to continue, or several")
    prompts: Path | None = option(None, "file of prompts: .txt, a line each, or .jsonl with prompt")
    out: Path | None = option(
        None, "with --prompts: .jsonl file of the answers, written as they come"
    )
    batch_size: int = option(8, "with --prompts: how many run together")
    resume: bool = option(False, "with --prompts: go on with the file of answers")
    chat: bool = option(False, "put prompts through the tokenizer's chat template")
    max_new_tokens: int | None = option(
        64, "add at most so many tokens; none, with --window and --stream: until the end token"
    )
    temperature: float = option(0.0, "0 takes the likeliest token, above it tokens are sampled")
    top_p: float = option(1.0, "sample among the likeliest tokens that hold this probability")
    top_k: int | None = option(None, "sample among so many likeliest tokens")
    seed: int | None = option(None, "makes sampling repeatable")
    window: int | None = option(
        None, "let a token see so many tokens, and keep no more: a text may then go on for ever"
    )
    stream: bool = option(False, "print the text as it comes")
    dtype: str = dtype_option()
    device: str | None = device_option()


def run(options: GenerateOptions) -> None:
    _check(options)
    if options.prompts is not None:
        assert options.out is not None
        with only_writer(options.out, is_file=True):
            return _answer_file(options)
    answer, _ = _load(options)
    answer = partial(answer, seed=options.seed)

    def answer_aloud(prompt: str) -> None:
        # With the first piece, so that a prompt that is refused is not shown.
        start = iter([_shown(prompt)])
        answer([prompt], stream=lambda text: print(next(start, "") + text, end="", flush=True))
        print(next(start, ""))

    def _shown(prompt: str) -> str:
        return "" if options.chat else prompt  # an answer does not go on with the question

    if options.stream:
        for prompt in options.prompt:
            answer_aloud(prompt)
    else:
        for prompt, text in zip(options.prompt, answer(options.prompt), strict=True):
            print(_shown(prompt) + text)


def _check(options: GenerateOptions) -> None:
    if bool(options.prompt) == (options.prompts is not None):
        raise InputError("give either --prompt, some text, or --prompts, a file of them")
    if options.prompts is None and (options.out is not None or options.resume):
        raise InputError("--out and --resume belong to --prompts")
    if options.prompts is not None and options.out is None:
        raise InputError("--prompts needs --out, the file of the answers")
    if options.prompts is not None and options.stream:
        raise InputError("--stream prints, and --prompts writes to --out; leave one out")
    if options.max_new_tokens is None and not options.stream:
        raise InputError("--max-new-tokens none needs --stream, or nothing would be shown")
    if options.batch_size < 1:
        raise InputError(f"--batch-size must be at least 1, got {options.batch_size}")
    check_settings(**_settings(options))


def _settings(options: GenerateOptions) -> dict[str, Any]:
    names = "max_new_tokens temperature top_p top_k window"
    return {name: getattr(options, name) for name in names.split()}


def _load(options: GenerateOptions) -> tuple[Callable[..., list[str]], Callable[..., list[int]]]:
    """``generate`` and ``encode_prompt`` for the model and the settings of the command."""
    model = load(options.model, options.dtype, options.device)
    tokenizer = load_tokenizer(options.model)
    if options.chat:
        check_chat_template(tokenizer)
    answer = partial(generate, model, tokenizer, chat=options.chat, **_settings(options))
    encode = partial(
        encode_prompt,
        model,
        tokenizer,
        max_new_tokens=options.max_new_tokens,
        chat=options.chat,
    )
    return answer, encode


def _answer_file(options: GenerateOptions) -> None:
    assert options.prompts is not None
    assert options.out is not None
    by_line = read_prompts(options.prompts, chat=options.chat)
    records = list(by_line.values())
    done = open_answers(options.out, records, resume=options.resume)
    if done < len(records):
        answer, encode = _load(options)
        # Now rather than hours into the run.
        wrong = {}
        for number, record in by_line.items():
            try:
                encode(record["prompt"])
            except InputError as error:
                wrong[number] = str(error)
        refuse_lines(options.prompts, wrong)
        answer_prompts(
            records,
            options.out,
            answer,
            done=done,
            batch_size=options.batch_size,
            seed=options.seed,
        )
    print(f"{len(records)} answers in {options.out}, {len(records) - done} of them new")
