"""What adapting a pretrained model to StableMask does to its attention sink and its outliers.

    python examples/smollm2.py --out runs/smollm2
    python examples/adapting.py split valid.txt --out runs/text
    stablemask finetune --model runs/smollm2 --data runs/text/train.txt --adapt --out runs/adapted ...
    python examples/adapting.py measure runs/smollm2 --text runs/text > before.json
    python examples/adapting.py measure runs/adapted --text runs/text > adapted.json
    python examples/adapting.py draw before=before.json adapted=adapted.json

`measure` prints one JSON object: perplexity on text not trained on, attention on the first token and
the pseudo share by layer, the largest activation and the kurtosis of the hidden states by layer, and
perplexity with int8 weights and activations (needs torchao). About 10 minutes for a model of 135M
parameters on 2 CPU cores. docs/results/adapting.md has what came of it.
"""

import argparse
import copy
import json
import re
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

import stablemask
from stablemask import strict_json
from stablemask.data import load_tokenizer
from stablemask.evaluation import layer_statistics, perplexity
from stablemask.evaluation.activations import hidden_state_outliers
from stablemask.evaluation.quantization import quantize_int8
from stablemask.hf import apply_stablemask, load_model

TRAIN_END, TEST_START = 0.7, 0.85  # shares of the text; what lies between is not used
TITLE = re.compile(r"^ = [^=].* = $", re.MULTILINE)  # of a Wikipedia article, in WikiText


def split_articles(text: str) -> tuple[str, str]:
    """Whole articles of a WikiText file: those that end in its first 70 %, begin in its last 15 %."""
    starts = [0, *(match.start() for match in TITLE.finditer(text)), len(text)]
    spans = list(pairwise(starts))
    train = "".join(text[a:b] for a, b in spans if b <= TRAIN_END * len(text))
    test = "".join(text[a:b] for a, b in spans if a >= TEST_START * len(text))
    return train, test


def measure(
    model: PreTrainedModel,
    test: Tensor,
    calibration: Tensor,
    *,
    length: int = 256,
    long_length: int = 1024,
    sequences: int = 32,
) -> dict[str, Any]:
    """Everything in question about one model. Lists are by layer.

    ``first_token`` is the mean attention on the first token, ``top_token`` that on whichever token
    of a sequence's first half gets most in a head, for a sink may move; each over the rows after it.

    Args:
        test, calibration: ids, (num_tokens,); the static int8 scales come from the latter.
        length: tokens in a sequence, read from position 0 each.
        long_length: a second length that perplexity is measured at.
        sequences: how many the attention, the hidden states and the int8 perplexities are measured
            on; plain perplexity is that of the whole test text.
    """
    blocks = test[: sequences * length].view(-1, length)
    layers = zip(
        *(layer_statistics(model, block) for block in tqdm(blocks, "attention", disable=None)),
        strict=True,
    )
    first_token, top_token, pseudo = [], [], []
    for layer in layers:
        first_token.append(torch.stack([s.first_token for s in layer]).mean().item())
        # In the second half the mean over the rows after a token is one over few.
        received = torch.stack([s.received[:, : length // 2] for s in layer])
        top_token.append(received.amax(-1).mean().item())
        pseudo.append(torch.stack([s.pseudo for s in layer]).mean().item())
    outliers = hidden_state_outliers(model, blocks)
    whole = {
        str(n): perplexity(model, test, length=n, stride=stride).perplexity
        for n, stride in ((length, length), (long_length, long_length // 2))
    }
    return {
        "stablemask": getattr(model.config, "stablemask", None),
        "perplexity": whole,
        "first_token": first_token,
        "top_token": top_token,
        "pseudo": pseudo,
        **{name: values.tolist() for name, values in outliers._asdict().items()},
        "int8": int8_perplexity(model, blocks, calibration[: blocks.numel()].view(-1, length)),
        "tokens": {"perplexity": len(test), "elsewhere": blocks.numel()},
    }


def int8_perplexity(
    model: PreTrainedModel, blocks: Tensor, calibration: Tensor
) -> dict[str, float]:
    """Perplexity of the blocks in full precision and with int8 weights and activations."""
    length = blocks.shape[1]

    def score(scored: PreTrainedModel) -> float:
        return perplexity(scored, blocks.flatten(), length=length, stride=length).perplexity

    return {
        "none": score(model),
        "dynamic": score(quantize_int8(copy.deepcopy(model), "dynamic")),
        "static": score(quantize_int8(copy.deepcopy(model), "static", calibration)),
    }


def draw(results: dict[str, dict[str, Any]], out: Path) -> list[Path]:
    """The figures of docs/results/adapting.md: by layer, attention and outliers; int8 as bars."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    from stablemask.report import drawing

    colors = (drawing.COLORS["softmax"], drawing.GRAY, *list(drawing.COLORS.values())[1:])
    styles = [
        {"color": color, "ls": line}
        for color, line, _ in zip(colors, cycle(drawing.LINES), results)
    ]
    with matplotlib.rc_context(drawing.STYLE):
        attention = Figure((9.6, 3.6), layout="constrained")
        panels = attention.subplots(1, 3, sharey=True)
        names = ("first_token", "top_token", "pseudo")
        for (label, result), style in zip(results.items(), styles):
            for axes, name in zip(panels, names):
                axes.plot(range(len(result[name])), result[name], label=label, **style)
        titles = ("On the first token", "On the token that gets most", "On the pseudo mass")
        for axes, title in zip(panels, titles):
            axes.set_title(title)
        panels[0].set_ylabel("mean share of a row's attention")
        panels[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        panels[0].set_ylim(bottom=0)

        outliers = Figure((9.6, 3.6), layout="constrained")
        right_panels = outliers.subplots(1, 2)
        for (label, result), style in zip(results.items(), styles):
            for axes, name in zip(right_panels, ("largest", "kurtosis")):
                axes.plot(range(len(result[name])), result[name], label=label, **style)
        right_panels[0].set(title="Largest activation", ylabel="largest magnitude (no unit)")
        right_panels[1].set(
            title="Heaviness of the tail", ylabel="kurtosis (3: normal distribution)"
        )
        for axes in right_panels:
            axes.set_yscale("log")
        for axes in (*panels, *right_panels):
            axes.set_xlabel("layer (number)")
        panels[2].legend()
        right_panels[0].legend()

        int8 = Figure((9.6, 3.4), layout="constrained")
        axes = int8.subplots()
        kinds = {
            "none": "float32",
            "dynamic": "int8, dynamic scales",
            "static": "int8, static scales",
        }
        width = 0.8 / len(kinds)
        for k, (name, label) in enumerate(kinds.items()):
            positions = [i + (k - 1) * width for i in range(len(results))]
            bars = axes.bar(
                positions, [result["int8"][name] for result in results.values()], 0.92 * width,
                color=colors[k], label=label, hatch=("", "//", "..")[k], edgecolor="white", linewidth=0,
            )  # fmt: skip
            axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=9)
        axes.set_xticks(range(len(results)), list(results))
        axes.set(ylabel="perplexity", title="Int8 weights and activations")
        axes.legend()

        paths = []
        for name, figure in (("attention", attention), ("outliers", outliers), ("int8", int8)):
            paths.append(out / f"adapting-{name}.png")
            figure.savefig(paths[-1], dpi=150)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    split = commands.add_parser("split", help="cut a WikiText file into texts to train and test on")
    split.add_argument("file", type=Path)
    split.add_argument("--out", type=Path, required=True, help="folder for train.txt and test.txt")
    measured = commands.add_parser("measure", help="print the JSON of one model")
    measured.add_argument("model")
    measured.add_argument("--text", type=Path, required=True, help="the folder `split` wrote")
    measured.add_argument("--gamma", type=float, help="give the model StableMask first, at once")
    measured.add_argument("--start", type=int, default=0, help="first position with a mass")
    measured.add_argument("--shift", type=float, default=0.0, help="added to the log of the mass")
    measured.add_argument("--tokens", type=int, help="read so many tokens of the test text at most")
    measured.add_argument("--sequences", type=int, default=32, help="of 256 tokens, for all else")
    drawn = commands.add_parser("draw", help="draw the figures of several models")
    drawn.add_argument("results", nargs="+", metavar="LABEL=FILE")
    drawn.add_argument("--out", type=Path, default=Path("docs/results"))
    options = parser.parse_args()

    if options.command == "split":
        options.out.mkdir(parents=True, exist_ok=True)
        for name, part in zip(("train", "test"), split_articles(options.file.read_text("utf-8"))):
            (options.out / f"{name}.txt").write_text(part, encoding="utf-8")
            print(f"{options.out / name}.txt: {len(part):,} characters")
        return
    if options.command == "draw":
        pairs = (text.partition("=") for text in options.results)
        results = {label: json.loads(Path(path).read_text("utf-8")) for label, _, path in pairs}
        for path in draw(results, options.out):
            print(path)
        return

    model = load_model(options.model, dtype=torch.float32)
    tokenizer = load_tokenizer(options.model)
    if options.gamma is not None:
        apply_stablemask(model, gamma=options.gamma, start=options.start, shift=options.shift)
    train_tokens, test_tokens = (
        torch.tensor(tokenizer((options.text / f"{name}.txt").read_text("utf-8")).input_ids)
        for name in ("train", "test")
    )
    result = measure(
        model, test_tokens[: options.tokens], train_tokens, sequences=options.sequences
    )
    versions = {m.__name__: m.__version__ for m in (stablemask, torch, transformers)}
    print(strict_json.dumps({"model": options.model, **result, "versions": versions}))


if __name__ == "__main__":
    main()
