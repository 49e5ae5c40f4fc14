"""What a model loses when it reads a long text from a bounded cache, and what the cache saves.

    python -m benchmarks streaming --models runs/softmax runs/stablemask --out streaming

prints tables and writes ``streaming.json`` and ``streaming.png``. Every cache reads the same texts, cut
from the validation side of ``--data``, token after token from position 0, and every token is scored.
With ``--decode N`` it times N tokens read one by one instead, and weighs the cache.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from stablemask import strict_json
from stablemask.data import load_documents, load_tokenizer, tokenize_documents
from stablemask.errors import InputError
from stablemask.evaluation.perplexity import perplexity_of
from stablemask.evaluation.streaming import (
    mean_and_error,
    position_bins,
    sink_cache,
    streaming_losses,
)
from stablemask.hf.loading import load_model
from stablemask.inference.model import evaluating
from stablemask.inference.streaming import cached_logits, window_cache
from stablemask.writing import whole_file, write_whole

from .environment import describe
from .figure import STYLE
from .tables import table

SINKS = 4  # first tokens that StreamingLLM keeps
DECODED_PER_ROW = 2_000  # tokens whose median time is one figure
FIRST_DRAWN = 8  # before it a range holds a few tokens of each text, and the line is noise
# Colour, marker and line by cache, of Okabe and Ito's palette; what lies under another is wide.
STYLES: dict[str, dict[str, Any]] = {
    "StreamingLLM": {"color": "#d55e00", "marker": "^", "ls": "-", "lw": 3.6, "alpha": 0.8},
    "all keys": {"color": "#000000", "marker": "s", "ls": ":"},
    "window": {"color": "#0072b2", "marker": "o", "ls": "--"},
    "window, mass held": {"color": "#009e73", "marker": "D", "ls": "-."},
}


def measure_model(model: PreTrainedModel, texts: Tensor, window: int) -> dict[str, Any]:
    """Nats by position for each cache, and how each differs from the plain window.

    Args:
        texts: (texts, length).
    """
    caches: dict[str, tuple[Cache, int]] = {
        "all keys": (DynamicCache(config=model.config), 512),
        "window": (window_cache(model, window), window),
        "StreamingLLM": (sink_cache(model, window, num_sinks=SINKS), 1),
    }
    if getattr(model.config.get_text_config(decoder=True), "stablemask", None) is not None:
        caches["window, mass held"] = (sink_cache(model, window, num_sinks=0), 1)
    nats = {
        name: streaming_losses(model, texts, cache, chunk_size=chunk)
        for name, (cache, chunk) in caches.items()
    }
    # The loss at index i is that of the token at position i + 1.
    octaves = [(1, window), *position_bins(texts.shape[1], 1, first=window)]
    return {
        name: {
            "bins": _by_bin(losses, position_bins(texts.shape[1])),
            "octaves": _by_bin(losses, octaves),
            "less than the window": _by_bin(nats["window"] - losses, octaves),
        }
        for name, losses in nats.items()
    }


def _by_bin(losses: Tensor, bins: list[tuple[int, int]]) -> list[dict[str, float]]:
    rows = []
    for start, end in bins:
        mean, error = mean_and_error(losses[:, start - 1 : end - 1])
        rows.append({"start": start, "end": end, "nats": mean, "standard_error": error})
    return rows


def measure_decoding(model: PreTrainedModel, text: Tensor, window: int) -> list[dict[str, Any]]:
    """Milliseconds per token and bytes of the cache while ``text``, (length,), is read one by one."""
    cache = window_cache(model, window)
    rows = []
    with evaluating(model):
        for piece in text.split(DECODED_PER_ROW):
            seconds = []
            for token in piece:
                start = time.perf_counter()
                cached_logits(model, token.view(1, 1).to(model.device), cache)
                seconds.append(time.perf_counter() - start)
            rows.append(
                {
                    "tokens": cache.get_seq_length(),
                    "milliseconds": 1e3 * statistics.median(seconds),
                    "cache_bytes": cache_bytes(cache),
                }
            )
    return rows


def cache_bytes(cache: Cache) -> int:
    """What the keys and values of a cache hold in memory, views at the size of what they view."""
    kept = (getattr(layer, name) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept if tensor is not None)


def draw(result: dict[str, Any]) -> Figure:
    """Perplexity by position above, and below it what each cache saves over the plain window."""
    models = result["models"]
    figure = Figure((5.4 * len(models), 6.2), layout="constrained")
    panels = figure.subplots(
        2, len(models), sharex="col", sharey="row", squeeze=False, height_ratios=(3, 2)
    )
    for (above, below), (label, measured) in zip(panels.T, models.items(), strict=True):
        for name in (name for name in STYLES if name in measured["caches"]):
            by_position = measured["caches"][name]
            bins = [row for row in by_position["bins"] if row["start"] >= FIRST_DRAWN]
            perplexities = [perplexity_of(row["nats"]) for row in bins]
            above.plot(_middles(bins), perplexities, label=name, markersize=4, **STYLES[name])
            saved = by_position["less than the window"][1:]
            below.errorbar(
                _middles(saved),
                [row["nats"] for row in saved],
                yerr=[row["standard_error"] for row in saved],
                markersize=4, elinewidth=1.2, capsize=2, **STYLES[name],
            )  # fmt: skip
        _mark(above, result["window"], "the window is full", 0.95)
        _mark(above, measured["trained_length"], "training length", 0.89)
        above.set_xscale("log", base=2)
        above.set_yscale("log")
        above.margins(y=0.16)
        above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        above.yaxis.set_minor_formatter(NullFormatter())
        above.set_title(label)
        above.legend(loc="best", framealpha=0.8, edgecolor="none")
        below.set_xlabel("position of the token in the text (log scale)")
        for axis in (below.xaxis, above.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    panels[0, 0].set_ylabel("perplexity (log scale)")
    panels[1, 0].set_ylabel("nats a token saved\nover the plain window")
    figure.suptitle(
        f"Reading a long text from {result['window']:,} keys per layer, or from all of them\n"
        f"{result['texts']} texts of {result['length']:,} tokens; below, bars of a standard error",
        fontsize=9.5,
    )
    return figure


def _middles(rows: list[dict[str, float]]) -> list[float]:
    """Where on a logarithmic axis a range of positions lies."""
    return [(row["start"] * (row["end"] - 1)) ** 0.5 for row in rows]


def _mark(axes: Axes, position: int, text: str, height: float) -> None:
    if not axes.get_xlim()[0] < position < axes.get_xlim()[1]:
        return
    axes.axvline(position, color="#6b7280", lw=0.9, ls=(0, (2, 2)), zorder=1)
    axes.text(
        position, height, f" {text}", transform=axes.get_xaxis_transform(), color="#374151",
        fontsize=8,
    )  # fmt: skip


def perplexities(measured: dict[str, Any]) -> str:
    """By octave of position, as Markdown."""
    caches = measured["caches"]
    octaves = [f"{row['start']:,}-{row['end'] - 1:,}" for row in caches["window"]["octaves"]]
    lines = [
        [name, *(f"{perplexity_of(row['nats']):.2f}" for row in rows["octaves"])]
        for name, rows in caches.items()
    ]
    for name, rows in caches.items():
        if name != "window":
            differences = rows["less than the window"]
            cells = (f"{d['nats']:+.4f} ± {d['standard_error']:.4f}" for d in differences)
            lines.append([f"nats that {name} saves over the window", *cells])
    return table(["position", *octaves], lines)


def _texts(model_path: str, data: str, count: int, length: int) -> Tensor:
    """``count`` texts of ``length`` tokens, spread evenly over the validation side of ``data``."""
    tokenizer = load_tokenizer(model_path)
    tokens = tokenize_documents(load_documents(data, split="validation"), tokenizer)
    if len(tokens) < count * length:
        raise InputError(
            f"{data} holds {len(tokens)} tokens of validation text, {count} texts of {length} need "
            f"{count * length}; ask for fewer --texts or a shorter --length"
        )
    starts = torch.arange(count) * (len(tokens) // count)
    return torch.stack([torch.as_tensor(tokens[s : s + length]).long() for s in starts.tolist()])


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks streaming", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--models", nargs="+", required=True, metavar="LABEL=PATH")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--window", type=int, default=256, help="keys per layer (default: 256)")
    parser.add_argument("--length", type=int, default=8192, help="of a text (default: 8192)")
    parser.add_argument("--texts", type=int, default=16, help="how many (default: 16)")
    parser.add_argument("--decode", type=int, default=0, help="time so many tokens instead")
    parser.add_argument(
        "--out", type=Path, required=True, help="name of the files, less .json, .png"
    )
    options = parser.parse_args(argv)

    result: dict[str, Any] = {
        **describe(torch.device("cpu")),
        **{name: getattr(options, name) for name in ("data", "window", "length", "texts")},
        "sinks": SINKS,
        "models": {},
    }
    for named in options.models:
        label, _, path = named.rpartition("=")
        model = load_model(path)
        measured: dict[str, Any] = {"trained_length": model.config.max_position_embeddings}
        if options.decode:
            text = _texts(path, options.data, 1, options.decode)[0]
            measured["decoding"] = measure_decoding(model, text, options.window)
            shown = "\n".join(map(str, measured["decoding"]))
        else:
            texts = _texts(path, options.data, options.texts, options.length)
            measured["caches"] = measure_model(model, texts, options.window)
            shown = perplexities(measured)
        result["models"][label or Path(path).name] = measured
        print(f"{label or path}\n\n{shown}\n", flush=True)
    write_whole(options.out.with_suffix(".json"), strict_json.dumps(result, indent=1) + "\n")
    if not options.decode:
        figure = options.out.with_suffix(".png")
        with matplotlib.rc_context(STYLE), whole_file(figure) as partial:
            draw(result).savefig(partial, dpi=160)
