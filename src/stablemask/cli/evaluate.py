"""Perplexity of a model on a text, by the length of its context, past the training length too; or, with
--tasks, its scores in tasks of the lm-evaluation-harness.
"""

import time
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from stablemask import __version__, strict_json
from stablemask.cli.models import load
from stablemask.cli.options import EvaluateOptions
from stablemask.data import load_documents, load_tokenizer, tokenize_documents
from stablemask.errors import InputError
from stablemask.evaluation import perplexity, perplexity_text
from stablemask.evaluation.tasks import evaluate_tasks, results_table
from stablemask.hf.loading import load_config
from stablemask.options import changed
from stablemask.training.trained_on import TrainedOn, trained_on

# Of one way of evaluating, without meaning in the other.
OF_PERPLEXITY: tuple[str, ...] = ("data", "split", "text_column", "lengths", "stride", "max_tokens")
OF_TASKS: tuple[str, ...] = ("include_path", "limit", "num_fewshot")


def run(options: EvaluateOptions) -> None:
    _refuse_options_of_the_other(options)
    text = None if options.tasks else _text(options)  # before the weights are read
    model = load(options)
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


def _refuse_options_of_the_other(options: EvaluateOptions) -> None:
    """An option that would be ignored is a mistake."""
    names, why = OF_TASKS, "is of tasks; name them with --tasks"
    if options.tasks:
        names, why = (
            OF_PERPLEXITY,
            "is of perplexity, which --tasks does not measure; leave one out",
        )
    for name in changed(options, names):
        raise InputError(f"--{name.replace('_', '-')} {why}")


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
    if not documents:
        raise InputError(f"{sources} has no text in its {options.split} part")
    tokens = tokenize_documents(documents, tokenizer)
    bytes_per_token = _bytes_per_token(
        documents, tokens, tokenizer.eos_token_id, options.max_tokens or len(tokens)
    )

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
            if len(refused) == len(lengths):
                raise
            row = {"length": length, "error": str(error)}
        results.append(row)
        _print_row(row, trained_length(model), first=len(results) == 1)

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


def _bytes_per_token(documents: list[str], tokens: np.ndarray, end: int, most: int) -> float:
    """Mean UTF-8 bytes of the first ``most`` tokens; of a document that is read in part, of all of it."""
    sizes = [len(document.encode()) for document in documents]
    ends = np.flatnonzero(tokens == end) + 1
    if len(ends) != len(sizes):  # a vocabulary whose end token is a word as well
        return sum(sizes) / len(tokens)
    read = min(most, len(tokens))
    return float(np.interp(read, [0, *ends], np.cumsum([0, *sizes]))) / read


def _versions(*packages: str) -> dict[str, str]:
    return {"stablemask": __version__} | {package: version(package) for package in packages}


def trained_length(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


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


COLUMNS = "{:>8}  {:>8}  {:>11}  {:>10}  {:>9}  {:>10}  {:>8}"
NAMES = ("length", "trained", "perplexity", "nats/token", "bits/byte", "tokens", "tokens/s")


def _print_row(row: dict[str, Any], trained: int | None, *, first: bool) -> None:
    """As soon as it is known, for the long lengths take their time."""
    if first:
        print(COLUMNS.format(*NAMES))
    multiple = f"{row['length'] / trained:.4g}x" if trained else "-"
    if "error" in row:
        print(f"{row['length']:>8}  {multiple:>8}  not scored: {row['error']}", flush=True)
        return
    cells = (
        row["length"],
        multiple,
        perplexity_text(row["perplexity"]),
        f"{row['nats_per_token']:.4f}",
        f"{row['bits_per_byte']:.4f}",
        row["tokens"],
        f"{row['tokens'] / row['seconds']:.0f}",
    )
    print(COLUMNS.format(*cells), flush=True)
