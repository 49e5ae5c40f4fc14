"""What adapting a pretrained model to StableMask does: to its texts, its attention sink, its outliers.

    stablemask finetune --model MODEL --adapt --out runs/adapted
    python examples/adapting.py measure MODEL --text wiki=wiki.txt code=code.txt > before.json
    python examples/adapting.py measure MODEL --text wiki=wiki.txt code=code.txt --prefix 1 > teacher.json
    python examples/adapting.py measure runs/adapted --text wiki=wiki.txt code=code.txt > adapted.json
    python examples/adapting.py table before=before.json teacher=teacher.json adapted=adapted.json
    python examples/adapting.py draw before=before.json teacher=teacher.json adapted=adapted.json

`measure` prints one JSON object; several of one label, FILE,FILE,FILE, are seeds of one training. With
`--prefix` the token stands in front of each text, where it serves a softmax model as its sink, and the
same tokens are scored. Costs in nats are measured on the first text. `measure` needs the extra `quant`,
`draw` the extra `report`. docs/results/adapting.md has what came of it.
"""

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import stablemask
from stablemask import strict_json
from stablemask.data import load_tokenizer
from stablemask.errors import InputError
from stablemask.evaluation.int4_cache import GROUP, int4_cache
from stablemask.evaluation.perplexity import token_losses, with_prefix
from stablemask.evaluation.quantization import quantize_int8
from stablemask.evaluation.sinks import layer_statistics
from stablemask.evaluation.statistics import Estimate, estimate
from stablemask.evaluation.streaming import compare_streaming, streaming_losses
from stablemask.evaluation.summary import sink_summary
from stablemask.hf import load_model
from stablemask.training.self_written import write_texts

LENGTH, STREAM_LENGTH = 256, 1024  # tokens of a text, and of one that is read from a window
WINDOW, SCORED_FROM = 128, 256
CHAT_SEED = 1_000_000  # none that a training is likely to have written its own texts by
KEPT = (0, 4)  # first tokens of the cache that stay in full precision

Measured = dict[str, Any]


def measure(
    model: PreTrainedModel,
    texts: dict[str, Tensor],
    prefix: int | None = None,
    *,
    sequences: int = 16,
    streams: int = 8,
    say: Callable[[str], None] = lambda what: None,
) -> Measured:
    """Everything in question about one model, but for how its costs compare with another's.

    Args:
        texts: ids, (texts, n), by name; all costs in nats are those of the first.
        prefix: read in front of each text, and not scored.
        sequences: texts that the int8 model reads; the scales of static activations come from as many
            others.
        streams: texts of 1,024 tokens that are read from a window, and from an int4 cache.
    """
    first = next(iter(texts.values()))
    streams = min(streams, first.numel() // STREAM_LENGTH)
    sequences = min(sequences, len(first) // 2)
    if streams < 1 or sequences < 1:
        raise InputError(
            f"the first text has {first.numel():,} tokens; give at least {STREAM_LENGTH:,}"
        )
    scored, calibration = first[:sequences], first[sequences : 2 * sequences]
    streamed = first.flatten()[: streams * STREAM_LENGTH].view(streams, STREAM_LENGTH)
    settings = getattr(model.config.get_text_config(decoder=True), "stablemask", None)
    measured: Measured = {"stablemask": settings, "prefix": prefix, "texts": {}}
    for name, ids in texts.items():
        say(f"{name}: {ids.numel():,} tokens")
        summary = sink_summary(model, ids, prefix)
        by_layer = {key: value for key, value in vars(summary).items() if key != "nats"}
        measured["texts"][name] = {
            "tokens": ids.numel(), "perplexity": summary.perplexity, **by_layer,
            "own_first_token": own_first_token(model, ids, prefix) or summary.first_token,
        }  # fmt: skip

    nats = token_losses(model, scored, prefix).mean().item()
    measured["int8"] = {}
    for activations in ("dynamic", "static"):
        say(f"int8, {activations} activations")
        quantized = quantize_int8(
            copy.deepcopy(model), activations, with_prefix(calibration, prefix)
        )
        losses = token_losses(quantized, scored, prefix)
        measured["int8"][activations] = losses.mean().item() - nats
        del quantized

    say(f"streaming: {streams} texts of {STREAM_LENGTH:,} tokens")
    losses = compare_streaming(
        model, streamed, window=WINDOW, scored_from=SCORED_FROM, prefix=prefix
    )
    measured["streaming"] = {
        "full": losses.full,
        "window": losses.window - losses.full,
        "StreamingLLM": losses.sinks - losses.full,
    }

    measured["int4_cache"] = {}
    for keep in KEPT:
        say(f"int4 cache, {keep} tokens in full precision")
        cache = int4_cache(model, keep=keep)
        losses = streaming_losses(model, streamed, cache, chunk_size=GROUP, prefix=prefix)
        later = losses[:, SCORED_FROM - 1 :].double().mean().item()
        measured["int4_cache"][str(keep)] = later - measured["streaming"]["full"]
    return measured


def own_first_token(model: PreTrainedModel, ids: Tensor, prefix: int | None) -> list[float] | None:
    """By layer, attention on the first token of the texts themselves; None where it is the first read."""
    read = with_prefix(ids, prefix)
    if read.shape == ids.shape:
        return None
    layers = [layer_statistics(model, text) for text in read]
    by_text = torch.tensor([[one.received[:, 1].mean() for one in text] for text in layers])
    return by_text.double().mean(0).tolist()


Rule = tuple[str, Callable[[Measured, Measured], float], int, float | None]


def rows(results: dict[str, list[Measured]], teacher: str) -> Iterator[Rule]:
    """Of the table: a name, a number of one measurement given the teacher's, its digits, its limit."""
    reference = results[teacher][0]
    for text in reference["texts"]:
        yield f"perplexity, {text}", lambda one, _, t=text: one["texts"][t]["perplexity"], 2, None
    for text in reference["texts"]:
        yield f"over the teacher's, {text} (%)", lambda one, of, t=text: _over(one, of, t), 1, 1.0
    for text in reference["texts"]:
        yield (
            f"first token, most in a layer, {text} (%)",
            lambda one, _, t=text: 100 * max(one["texts"][t]["first_token"]), 1, 1.5,
        )  # fmt: skip
    for text in reference["texts"]:
        yield (
            f"the text's own first token, {text} (%)",
            lambda one, _, t=text: 100 * max(one["texts"][t]["own_first_token"]), 1, None,
        )  # fmt: skip
    yield "largest activation", lambda one, _: _worst(one, "largest"), 0, 500.0
    yield "the same behind the last layer", lambda one, _: _last(one, "largest"), 0, None
    yield "largest kurtosis of a layer", lambda one, _: _worst(one, "kurtosis"), 0, 1500.0
    yield "the same behind the last layer", lambda one, _: _last(one, "kurtosis"), 0, None
    least = reference["streaming"]["StreamingLLM"]
    yield "streaming, nothing kept (nats)", lambda one, _: one["streaming"]["window"], 3, least
    yield "StreamingLLM, 4 kept (nats)", lambda one, _: one["streaming"]["StreamingLLM"], 3, None
    yield "int8, static (nats)", lambda one, _: one["int8"]["static"], 3, 0.1
    yield "int8, dynamic (nats)", lambda one, _: one["int8"]["dynamic"], 3, None
    softmax = [one for seeds in results.values() for one in seeds if not one["stablemask"]]
    least = min(min(one["int4_cache"].values()) for one in softmax)
    yield "int4 cache (nats)", lambda one, _: one["int4_cache"]["0"], 3, least
    yield "int4 cache, 4 kept exact (nats)", lambda one, _: one["int4_cache"]["4"], 3, None


def _over(one: Measured, teacher: Measured, text: str) -> float:
    """How much a perplexity is above the teacher's, in percent."""
    ratio = one["texts"][text]["perplexity"] / teacher["texts"][text]["perplexity"]
    return 100 * (ratio - 1)


def _worst(one: Measured, name: str) -> float:
    """The most on any text of what any layer puts out for the next to read."""
    return max(max(text[name][:-1]) for text in one["texts"].values())


def _last(one: Measured, name: str) -> float:
    """The most on any text of what the last layer puts out, which a normalisation reads."""
    return max(text[name][-1] for text in one["texts"].values())


def table(results: dict[str, list[Measured]], teacher: str) -> str:
    """Markdown: a mean over seeds, and its 95 % interval by Student's t where there are several."""
    lines = [["", *results, "to reach"], ["---"] * (len(results) + 2)]
    for name, value, digits, limit in rows(results, teacher):
        cells = []
        for measured in results.values():
            found = estimate([value(one, results[teacher][0]) for one in measured])
            cells.append(_cell(found, digits))
        lines.append([name, *cells, "" if limit is None else f"at most {limit:,.{digits}f}"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(found: Estimate, digits: int) -> str:
    mean = f"{round(found.mean, digits) + 0.0:,.{digits}f}"  # no minus before a zero
    return mean if math.isnan(found.half_width) else f"{mean} ± {found.half_width:,.{digits}f}"


def read_text(path: Path, tokenizer: Any, tokens: int) -> Tensor:
    """(texts, n): those of a ``.npy`` file of ids, or of plain text cut into pieces of 256 tokens."""
    if path.suffix == ".npy":
        ids = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.int64))
        return ids[: max(1, tokens // ids.shape[1])]
    found = tokenizer(path.read_text("utf-8"), add_special_tokens=False).input_ids[:tokens]
    return torch.tensor(found[: len(found) // LENGTH * LENGTH]).view(-1, LENGTH)


def write_chats(model: str, prefix: int | None, chats: int, folder: Path) -> Path:
    """The file of chats of 256 tokens that a model writes, both sides of them, in its template's form."""
    write_texts(
        load_model(model), load_tokenizer(model), folder, prefix=prefix, texts=chats, length=LENGTH,
        seed=CHAT_SEED, kinds={"chats": 1}, batch_size=chats,
    )  # fmt: skip
    return folder / "00000-chats.npy"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("measure", help="print the JSON of one model")
    measured.add_argument("model")
    measured.add_argument(
        "--text", nargs="+", required=True, metavar="NAME=FILE", help="plain text, or .npy of ids"
    )
    measured.add_argument(
        "--chats", type=Path, help="a .npy of chats as the template writes them, (chats, n)"
    )
    measured.add_argument("--prefix", type=int, metavar="TOKEN_ID", help="in front of each text")
    measured.add_argument("--tokens", type=int, default=8192, help="of each text (default: 8192)")
    measured.add_argument(
        "--sequences", type=int, default=16, help="of 256 tokens, for int8 (default: 16)"
    )
    measured.add_argument(
        "--streams", type=int, default=8, help="of 1,024 tokens, for streaming, int4 (default: 8)"
    )
    written = commands.add_parser("chats", help="have a model write chats to measure on")
    written.add_argument("model")
    written.add_argument("--prefix", type=int, metavar="TOKEN_ID", help="in front of each chat")
    written.add_argument("--chats", type=int, default=32, help="of 256 tokens (default: 32)")
    written.add_argument("--out", type=Path, required=True, help="folder to write")
    shown = commands.add_parser("table", help="print a Markdown table of several models")
    drawn = commands.add_parser("draw", help="draw the figures of several models")
    for command in (shown, drawn):
        command.add_argument("results", nargs="+", metavar="LABEL=FILE[,FILE...]")
        command.add_argument("--teacher", default="teacher", help="label of what to compare with")
    drawn.add_argument("--out", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    for pair in getattr(options, "text", []) + getattr(options, "results", []):
        if "=" not in pair:
            parser.error(f"{pair!r} must be NAME=FILE")

    if options.command in ("table", "draw"):
        pairs = (text.partition("=") for text in options.results)
        results = {
            label: [json.loads(Path(path).read_text("utf-8")) for path in paths.split(",")]
            for label, _, paths in pairs
        }
        if options.teacher not in results:
            parser.error(f"no {options.teacher}=FILE among {', '.join(results)}; see --teacher")
        if options.command == "table":
            print(table(results, options.teacher))
        else:
            from adapting_figures import draw

            for path in draw(results, options.teacher, options.out):
                print(path)
        return

    if options.command == "chats":
        try:
            path = write_chats(options.model, options.prefix, options.chats, options.out)
        except InputError as error:
            parser.error(str(error))
        print(path)
        return

    if find_spec("torchao") is None:
        parser.error("int8 needs torchao: pip install -e '.[quant]'")
    start = time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - start:5.0f} s  {what}", file=sys.stderr, flush=True)

    try:
        model, tokenizer = (
            load_model(options.model, dtype=torch.float32),
            load_tokenizer(options.model),
        )
        named = dict(text.split("=", 1) for text in options.text)
        if options.chats is not None:
            named["chats"] = options.chats
        texts = {
            name: read_text(Path(file), tokenizer, options.tokens) for name, file in named.items()
        }
        result = measure(
            model, texts, options.prefix,
            sequences=options.sequences, streams=options.streams, say=say,
        )  # fmt: skip
    except (InputError, OSError) as error:
        parser.error(str(error))
    say("done")
    versions = {m.__name__: m.__version__ for m in (stablemask, torch, transformers)}
    print(
        strict_json.dumps(
            {
                "model": options.model,
                **result,
                "seconds": round(time.perf_counter() - start),
                "versions": versions,
            }
        )
    )


if __name__ == "__main__":
    main()
