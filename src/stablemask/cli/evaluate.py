"""Perplexity of a model on a text, by the length of its context, past the training length too; or, with
--tasks, its scores in tasks of the lm-evaluation-harness.
"""

import time
from dataclasses import MISSING, asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from stablemask import __version__, strict_json
from stablemask.cli.models import device_option, dtype_option, load
from stablemask.data import load_documents, load_tokenizer, tokenize_documents
from stablemask.errors import InputError
from stablemask.evaluation import perplexity, perplexity_text
from stablemask.evaluation.tasks import evaluate_tasks, results_table
from stablemask.hf.loading import load_config
from stablemask.options import option
from stablemask.training.trained_on import TrainedOn, trained_on

SUMMARY = "perplexity of a model on a text by length, or its scores in tasks"

# Of one way of evaluating, without meaning in the other.
OF_PERPLEXITY = ("data", "split", "text_column", "lengths", "stride", "max_tokens")
OF_TASKS = ("include_path", "limit", "num_fewshot")


@dataclass(kw_only=True)
class EvaluateOptions:
    model: str = option(MISSING, "folder or hub name of the model")
    data: str | None = option(
        None,
        "builtin, a file or folder of text, or hub:OWNER/NAME[:CONFIG]; by default what the model was "
        "trained on, where its folder says so",
    )
    split: Literal["validation", "train", "all"] = option("validation", "which part of the data")
    text_column: str | None = option(
        None, "field of a record that holds its text; by default text, or that of the training"
    )
    lengths: list[str] = option(["1x", "2x", "4x"], "in tokens, or in training lengths")
    stride: int | None = option(None, "new tokens a window scores; by default half its length")
    max_tokens: int | None = option(None, "read so many tokens of the text at most")
    tasks: list[str] = option([], "instead: tasks or groups of the lm-evaluation-harness")
    include_path: Path | None = option(None, "folder of tasks of your own, in its YAML format")
    limit: int | None = option(None, "take the first so many examples of each task")
    num_fewshot: int | None = option(None, "solved examples before each; by default the task's own")
    batch_size: int | None = option(
        None, "windows in a batch, by default what memory allows; of tasks, requests, by default 1"
    )
    dtype: str = dtype_option()
    device: str | None = device_option()


def run(options: EvaluateOptions) -> None:
    _refuse_mixture(options)
    text = None if options.tasks else _text(options)  # before the weights are read
    model = load(options.model, options.dtype, options.device)
    if text is None:
        _run_tasks(options, model)
    else:
        _run_perplexity(options, model, text)


def _text(options: EvaluateOptions) -> TrainedOn:
    """What is to be scored: what was asked for, or what the model was trained on."""
    if options.data is not None:
        return TrainedOn([options.data], options.text_column or "text")
    load_config(options.model)  # where there is no model, that is to be said
    text = trained_on(options.model)
    if text is None:
        raise InputError(
            f"{options.model} does not say what it was trained on; name a text to score: --data, such as "
            "--data builtin or a file"
        )
    return replace(text, text_column=options.text_column or text.text_column)


def _documents(options: EvaluateOptions, text: TrainedOn) -> list[str]:
    try:
        return [
            document
            for source in text.sources
            for document in load_documents(
                source, split=options.split, text_column=text.text_column
            )
        ]
    except InputError as error:
        if options.data is not None:
            raise
        raise InputError(
            f"{options.model} was trained on what cannot be read here ({error}); name a text to score: "
            "--data"
        ) from error


def _refuse_mixture(options: EvaluateOptions) -> None:
    """An option that would be ignored is a mistake."""
    default = EvaluateOptions(model=options.model)
    for name in OF_PERPLEXITY if options.tasks else OF_TASKS:
        if getattr(options, name) != getattr(default, name):
            flag = f"--{name.replace('_', '-')}"
            raise InputError(
                f"{flag} is of perplexity, which --tasks does not measure; leave one out"
                if options.tasks
                else f"{flag} is of tasks; name them with --tasks"
            )


def _run_tasks(options: EvaluateOptions, model: PreTrainedModel) -> None:
    results = evaluate_tasks(
        model,
        load_tokenizer(options.model),
        ",".join(options.tasks).replace(" ", "").split(","),
        include_path=options.include_path,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        batch_size=1 if options.batch_size is None else options.batch_size,
    )
    print(results_table(results))
    summary = {
        "model": options.model,
        "results": results["results"],
        "num_fewshot": results["n-shot"],
        "limit": options.limit,
        "device": str(model.device),
        "versions": _versions("torch", "transformers", "lm_eval"),
    }
    print(strict_json.dumps(summary))


def _run_perplexity(options: EvaluateOptions, model: PreTrainedModel, text: TrainedOn) -> None:
    lengths = parse_lengths(options.lengths, model)
    tokenizer = load_tokenizer(options.model)
    documents = _documents(options, text)
    sources = ", ".join(text.sources)
    if options.data is None:
        part = "all" if options.split == "all" else f"the {options.split} part"
        print(f"{part} of {sources}, which {options.model} was trained on")
    tokens = tokenize_documents(documents, tokenizer)
    bytes_per_token = sum(len(document.encode()) for document in documents) / len(tokens)

    table = _Table(model)
    results: list[dict[str, Any]] = []
    refused: list[InputError] = []
    for length in lengths:
        start = time.perf_counter()
        try:
            result = perplexity(
                model,
                tokens,
                length=length,
                stride=options.stride,
                batch_size=options.batch_size,
                max_tokens=options.max_tokens,
                bytes_per_token=bytes_per_token,
            )
            row = {**asdict(result), "seconds": time.perf_counter() - start}
        except InputError as error:  # one length may be impossible and the others not
            refused.append(error)
            row = {"length": length, "error": str(error)}
        if len(refused) == len(lengths):
            raise refused[0]
        results.append(row)
        table.print_row(row)

    summary = {
        "model": options.model,
        "data": sources,
        "split": options.split,
        "trained_length": trained_length(model),
        "results": results,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "versions": _versions("torch"),
    }
    print(strict_json.dumps(summary))


def _versions(*packages: str) -> dict[str, str]:
    return {"stablemask": __version__} | {package: version(package) for package in packages}


def trained_length(model: PreTrainedModel) -> int | None:
    return getattr(model.config, "max_position_embeddings", None)


def parse_lengths(texts: list[str], model: PreTrainedModel) -> list[int]:
    """``["1x,2x", "512"]`` -> tokens; an x stands for the model's training length."""
    words = ",".join(texts).replace(" ", "").split(",")
    return list(dict.fromkeys(_parse_length(word, model) for word in words))


def _parse_length(text: str, model: PreTrainedModel) -> int:
    try:
        if not text.endswith("x"):
            return int(text)
        multiple = float(text[:-1])
        trained = trained_length(model)
        if trained is not None:
            return int(multiple * trained)
    except (ValueError, OverflowError):
        raise InputError(
            f"lengths must be tokens such as 512, or training lengths such as 2x, got {text!r}"
        ) from None
    raise InputError(f"the model names no training length; give tokens, not {text!r}")


class _Table:
    """Prints each row as soon as it is known: the long lengths take their time."""

    names = ("length", "trained", "perplexity", "nats/token", "bits/byte", "tokens", "tokens/s")
    columns = "{:>8}  {:>8}  {:>11}  {:>10}  {:>9}  {:>10}  {:>8}"

    def __init__(self, model: PreTrainedModel):
        self.trained = trained_length(model)
        self.empty = True

    def print_row(self, row: dict[str, Any]) -> None:
        if self.empty:
            print(self.columns.format(*self.names), flush=True)
            self.empty = False
        multiple = f"{row['length'] / self.trained:.4g}x" if self.trained else "-"
        if "error" in row:
            print(f"{row['length']:>8}  {multiple:>8}  not scored: {row['error']}", flush=True)
            return
        print(
            self.columns.format(
                row["length"],
                multiple,
                perplexity_text(row["perplexity"]),
                f"{row['nats_per_token']:.4f}",
                f"{row['bits_per_byte']:.4f}",
                row["tokens"],
                f"{row['tokens'] / row['seconds']:.0f}",
            ),
            flush=True,
        )
