"""Continue prompts with a trained model, greedily or by sampling: some, a file of them, or a stream."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from stablemask.cli.models import load
from stablemask.cli.options import GenerateOptions
from stablemask.data import load_tokenizer
from stablemask.errors import InputError
from stablemask.inference import generate
from stablemask.inference.batch import answer_prompts, open_answers, read_prompts, refuse_lines
from stablemask.inference.generate import check_chat_template, check_settings, encode_prompt
from stablemask.options import check_least
from stablemask.writing import only_writer


def run(options: GenerateOptions) -> None:
    _check(options)
    if options.prompts is not None and options.out is not None:
        with only_writer(options.out, is_file=True):
            _answer_file(options, options.prompts, options.out)
        return
    answer, _ = _load(options)
    # An answer in a chat does not go on with the question.
    heads = ["" if options.chat else prompt for prompt in options.prompt]
    if options.stream:
        for prompt, head in zip(options.prompt, heads, strict=True):
            _answer_aloud(partial(answer, [prompt], seed=options.seed), iter([head]))
    else:
        for head, text in zip(heads, answer(options.prompt, seed=options.seed), strict=True):
            print(head + text)


def _answer_aloud(answer: Callable[..., list[str]], head: Iterator[str]) -> None:
    # With the first piece, so that a prompt that is refused is not shown.
    answer(stream=lambda text: print(next(head, "") + text, end="", flush=True))
    print(next(head, ""))


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
    check_least(options, batch_size=1)
    check_settings(**_settings(options))


def _settings(options: GenerateOptions) -> dict[str, Any]:
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "window")
    return {name: getattr(options, name) for name in names}


def _load(options: GenerateOptions) -> tuple[Callable[..., list[str]], Callable[[str], list[int]]]:
    """``generate`` and ``encode_prompt`` for the model and the settings of the command."""
    model, tokenizer = load(options), load_tokenizer(options.model)
    if options.chat:
        check_chat_template(tokenizer)
    answer = partial(generate, model, tokenizer, chat=options.chat, **_settings(options))
    most = options.max_new_tokens
    return answer, partial(encode_prompt, model, tokenizer, max_new_tokens=most, chat=options.chat)


def _answer_file(options: GenerateOptions, prompts: Path, out: Path) -> None:
    by_line = read_prompts(prompts, chat=options.chat)
    records = list(by_line.values())
    done = open_answers(out, records, resume=options.resume)
    if done < len(records):
        answer, encode = _load(options)
        wrong = {}
        for number, record in by_line.items():  # now rather than hours into the run
            try:
                encode(record["prompt"])
            except InputError as error:
                wrong[number] = str(error)
        refuse_lines(prompts, wrong)
        answer_prompts(
            records, out, answer, done=done, batch_size=options.batch_size, seed=options.seed
        )
    print(f"{len(records)} answers in {out}, {len(records) - done} of them new")
