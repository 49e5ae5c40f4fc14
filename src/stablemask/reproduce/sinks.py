"""Attention sinks: whether they grow, on what, and what they cost a quantised model."""

from __future__ import annotations

import copy
import math
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from ..data import PackedDataset, prepare_corpus
from ..data.batches import Shuffle
from ..evaluation.activations import hidden_state_outliers
from ..evaluation.attention_maps import LayerAttention, reduce_attention
from ..evaluation.perplexity import perplexity
from ..evaluation.quantization import quantize_int8
from ..models import StableMaskForCausalLM
from ..models.presets import PRESETS, preset_config
from ..report.drawing import GRAY
from .kinds import LABELS, config_fields, line_style
from .page import table
from .statistics import Estimate, estimate
from .study import SOURCE, Claim, Job, Record, Section, Study, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KINDS = ("softmax", "stablemask", "stablemask-slopes", "softmax1", "learned-sink")
PAIR = KINDS[:2]

# How a block begins: where the text was cut, or with the end of a document.
CUT, END = "cut", "end"

# So many times what even attention gives the first token makes a sink of it.
SINK = 3

Measure = Callable[[Record], "float | None"]


def jobs(scale: str, seeds: int) -> list[Job]:
    plans: list[tuple[dict[str, Any], tuple[str, ...], int, float]]
    options: dict[str, Any]
    if scale == "gpu":
        options = {"steps": 1500, "batch_size": 32, "learning_rate": 1e-3}
        plans = [
            ({"preset": "71m", "start": CUT, **options}, PAIR, seeds, 40),
            ({"preset": "160m", "start": CUT, **options}, PAIR, 1, 90),
        ]
    else:
        # The smallest in which softmax was seen to grow a sink (docs/log.md).
        sizes = {"vocab_size": 512, "max_position_embeddings": 256}
        options = {"preset": "nano", "steps": 5000, "batch_size": 4, "learning_rate": 5e-3, **sizes}
        plans = [
            ({"start": END, **options}, KINDS, seeds, 170),
            # One seed is all there is time for.
            ({"start": CUT, **options}, PAIR, 1, 170),
        ]
    return [
        Job(
            f"{options['preset']}-{options['start']}-{kind}-{seed}",
            run,
            {"kind": kind, "seed": seed, "source": SOURCE, **options},
            cost,
        )
        for options, kinds, count, cost in plans
        for seed in range(count)
        for kind in kinds
    ]


# Measuring


def run(
    work: Path,
    *,
    kind: str,
    seed: int,
    source: str,
    preset: str,
    start: str,
    steps: int,
    batch_size: int,
    learning_rate: float,
    blocks: int = 128,
    **sizes: int,
) -> dict[str, Any]:
    """Train a model, and look at its attention, its outliers and its int8 copies.

    Args:
        start: how every block begins, in training and validation.
        blocks: of validation, on which the model is looked at.
        sizes: fields of the configuration in place of the preset's.
    """
    context = sizes.get("max_position_embeddings", PRESETS[preset]["max_position_embeddings"])
    config = preset_config(preset, **{**config_fields(kind, context), **sizes})
    corpus = prepare_corpus(source, block_size=context, vocab_size=config.vocab_size)
    first = corpus.tokenizer.eos_token_id if start == END else None
    delimiters = _delimiters(corpus.tokenizer)
    validation = _spread(corpus.validation, blocks, first)
    few = validation[::8]
    curve: dict[str, list[float]] = {"step": [], "first_token": [], "first_token_head": []}

    def watch(step: int) -> None:
        found = attention_by_layer(model, few, delimiters)
        curve["step"].append(step)
        curve["first_token"].append(float(np.mean(found["first_token"])))
        curve["first_token_head"].append(max(found["first_token_head"]))

    torch.manual_seed(seed)
    model = StableMaskForCausalLM(config)
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    _train(model, corpus.train, first, steps, batch_size, learning_rate, seed, watch)

    outliers = hidden_state_outliers(model, validation)
    perplexity_of = _PerplexityOn(validation)
    return {
        "context": context,
        "curve": curve,
        **attention_by_layer(model, validation, delimiters),
        "largest": outliers.largest.tolist(),
        "kurtosis": outliers.kurtosis.tolist(),
        "perplexity": perplexity_of(model),
        **_int8(model, _spread(corpus.train, 32, first), perplexity_of),
    }


def _train(
    model: StableMaskForCausalLM,
    data: PackedDataset,
    first: int | None,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    watch: Callable[[int], None],
) -> None:
    """As ``pretrain`` does it; ``first`` takes the place of the first token of each block."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    schedule = get_cosine_with_min_lr_schedule_with_warmup(
        optimizer, steps // 20, steps, min_lr_rate=0.1
    )
    order = Shuffle(len(data), seed)
    on_gpu = model.device.type == "cuda"
    model.train()
    for step in range(steps):
        if step % max(1, steps // 20) == 0:
            watch(step)
        drawn = range(step * batch_size, (step + 1) * batch_size)
        ids = _blocks(data, [order[k] for k in drawn], first).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=on_gpu):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    watch(steps)


def _blocks(data: PackedDataset, indices: Sequence[int], first: int | None) -> Tensor:
    """(blocks, n)."""
    ids = torch.stack([data[index]["input_ids"] for index in indices])
    if first is not None:
        ids[:, 0] = first
    return ids


def _spread(data: PackedDataset, blocks: int, first: int | None) -> Tensor:
    """Blocks from the beginning of the data to its end, (blocks, n)."""
    indices = np.linspace(0, len(data) - 1, min(blocks, len(data)), dtype=int)
    return _blocks(data, indices.tolist(), first)


@dataclass(frozen=True)
class _PerplexityOn:
    blocks: Tensor

    def __call__(self, model: PreTrainedModel) -> float:
        length = self.blocks.shape[1]
        found = perplexity(
            model, self.blocks.flatten(), length=length, stride=length, progress=False
        )
        return found.perplexity


def attention_by_layer(
    model: PreTrainedModel, input_ids: Tensor, delimiters: Tensor
) -> dict[str, list[float]]:
    """Attention on the first token and on delimiters, means over sequences and rows, by layer.

    Real attention is what a row gives to real tokens: the share of a sink or a pseudo mass is taken
    out of it, and the rest made to sum to 1. Row 0, which has no choice, is left out.

    Args:
        input_ids: (B, n).
        delimiters: whether a token of the vocabulary is one, (V,) of bool.

    Returns:
        ``first_token`` is its share of all attention, the mean over heads, and ``first_token_real``
        of real attention; ``first_token_head`` and ``first_token_real_head`` those of the head with
        the most. ``delimiters`` and ``others`` are the real attention that such tokens, the first
        left out, receive from the rows after them, over what even attention gives them.
        ``mask_ratio`` is the share of all attention that goes to no token.
    """
    looks = []
    for sequence in input_ids:
        of = delimiters[sequence]
        looks.append(
            torch.stack(reduce_attention(model, sequence, partial(_look, is_delimiter=of)))
        )
    even = _even_attention(input_ids.shape[1]).sum(0)[1:]
    mean = torch.stack(looks).mean(0)  # (L, 5, H)
    is_delimiter = delimiters[input_ids][:, 1:].double()
    first_token, first_token_real, mask_ratio, to_delimiters, to_others = mean.unbind(1)
    return {
        "first_token": first_token.mean(1).tolist(),
        "first_token_head": first_token.amax(1).tolist(),
        "first_token_real": first_token_real.mean(1).tolist(),
        "first_token_real_head": first_token_real.amax(1).tolist(),
        "delimiters": (to_delimiters.mean(1) / (is_delimiter @ even).mean()).tolist(),
        "others": (to_others.mean(1) / ((1 - is_delimiter) @ even).mean()).tolist(),
        "mask_ratio": mask_ratio.mean(1).tolist(),
    }


def _look(attention: LayerAttention, is_delimiter: Tensor) -> Tensor:
    """Of each head, (5, H): attention on the first token, that of real attention, the mask ratio, and
    the sums of real attention on earlier delimiters and on other tokens."""
    real = attention.real[0].double()
    share = real / real.sum(-1, keepdim=True)
    received = share.tril(-1).sum(-2)[:, 1:].cpu()
    chosen = is_delimiter[1:].double()
    return torch.stack(
        [
            real[:, 1:, 0].mean(1).cpu(),
            share[:, 1:, 0].mean(1).cpu(),
            attention.pseudo[0].double().mean(1).cpu(),
            received @ chosen,
            received @ (1 - chosen),
        ]
    )


def _even_attention(length: int) -> Tensor:
    """What rows that attend evenly give to each earlier token, (n, n)."""
    rows = torch.arange(1, length + 1, dtype=torch.float64)
    return (1 / rows)[:, None].expand(length, length).tril(-1)


def even_first_token(length: int) -> float:
    """The mean attention on token 0 of rows that attend evenly, row 0 left out."""
    return _even_attention(length)[1:, 0].mean().item()


def _delimiters(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Tokens of punctuation and white space only, and the end of a document, (V,)."""
    marks = string.punctuation + string.whitespace
    texts = (tokenizer.decode([token]) for token in range(len(tokenizer)))
    return torch.tensor(
        [
            token == tokenizer.eos_token_id or all(character in marks for character in text)
            for token, text in enumerate(texts)
        ]
    )


def _int8(
    model: PreTrainedModel,
    calibration: Tensor,
    perplexity_of: Callable[[PreTrainedModel], float],
) -> dict[str, float | None]:
    """Perplexities of int8 copies; None where torchao is missing."""
    modes: tuple[Literal["dynamic", "static"], ...] = ("dynamic", "static")
    found: dict[str, float | None] = dict.fromkeys(f"perplexity_int8_{mode}" for mode in modes)
    if find_spec("torchao") is not None:
        for mode in modes:
            quantised = quantize_int8(copy.deepcopy(model), mode, calibration)
            found[f"perplexity_int8_{mode}"] = perplexity_of(quantised)
    return found


# Saying what came of it


_STARTS = {CUT: "packed blocks", END: "end token first"}
_INTRODUCTION = """\
Rows of softmax sum to 1, so a head with nothing to say must still look somewhere, and the first
token, which every row sees, becomes its sink. *Packed blocks* begin where the text was cut, as in
all of our training: their first token is arbitrary. With the *end token first* it is the same in
every block, which is where sinks are known to grow soonest.

*First token* is the mean attention that it gets from the rows after it, on validation text.
Attention that goes to a pseudo mass or a sink logit goes to no token at all (*mask ratio*). So that
this alone is not taken for a cure, the share of *real* attention is given too: what tokens receive,
made to sum to 1. *Delimiters* are tokens of punctuation and white space only; the real attention
that they receive is divided by what even attention would give them, in the layer with the most.
Activations and kurtosis (3 for a normal distribution) are of the hidden states behind a layer, the
layer with the most. Int8 is of weights and activations inside all layers, with a scale of
activations for each token (dynamic) or fixed beforehand (static)."""
_RULES = f"""\
Softmax has a sink where its head with the most gives the first token at least {SINK} times what
even attention does. StableMask mends it where its own figure is lower, of all attention and of real
attention; in part where of one alone. The other measures are compared likewise. Lower means that
the intervals are apart; of a single seed, that it is at most half, and what lies between half and
twice stays open."""


@dataclass(frozen=True)
class _Size:
    """The records of one size of model whose blocks begin alike, by kind."""

    preset: str
    start: str
    records: dict[str, list[Record]]

    @property
    def title(self) -> str:
        return f"{self.preset}, {_STARTS[self.start]}"

    @property
    def even(self) -> float:
        """What even attention gives the first token."""
        return even_first_token(next(iter(self.records.values()))[0]["context"])

    def of(self, kind: str, measure: Measure) -> Estimate | None:
        """None where some record has no such measurement, or there is no record."""
        values = [measure(record) for record in self.records.get(kind, [])]
        found = [value for value in values if value is not None]
        return estimate(found) if found and len(found) == len(values) else None


def section(records: list[Record]) -> Section:
    sizes = _sizes(records)
    return Section(
        claims=_claims(sizes),
        body="\n\n".join(
            [_INTRODUCTION, *(_table(size) for size in sizes), _RULES, "{steps}", "{layers}"]
        ),
        figures={
            "steps": (_steps_figure(sizes), "First-token attention over training, by attention"),
            "layers": (
                _layers_figure(sizes),
                "Attention on the first token and on delimiters by layer, by attention",
            ),
        },
    )


def _sizes(records: list[Record]) -> list[_Size]:
    found: dict[tuple[str, str], dict[str, list[Record]]] = {}
    for record in records:
        group = found.setdefault((record["preset"], record["start"]), {})
        group.setdefault(record["kind"], []).append(record)
    return [_Size(*group, kinds) for group, kinds in found.items()]


def _peak(name: str) -> Measure:
    """That of the layer with the most."""
    return lambda record: max(record[name])


def _mean(name: str) -> Measure:
    """Over layers."""
    return lambda record: sum(record[name]) / len(record[name])


def _int8_loss(activations: str) -> Measure:
    """How much perplexity rises."""

    def measure(record: Record) -> float | None:
        quantised = record[f"perplexity_int8_{activations}"]
        return None if quantised is None else quantised / record["perplexity"] - 1

    return measure


# Head of a column, what stands in it, digits, and the scale that it is shown at.
_COLUMNS: list[tuple[str, Measure, int, float]] = [
    ("perplexity", lambda record: record["perplexity"], 2, 1),
    ("first token, mean, %", _mean("first_token"), 1, 100),
    ("first token, largest head, %", _peak("first_token_head"), 1, 100),
    ("the same of real attention, %", _peak("first_token_real_head"), 1, 100),
    ("delimiters, × even", _peak("delimiters"), 2, 1),
    ("mask ratio, %", _mean("mask_ratio"), 1, 100),
    ("largest activation", _peak("largest"), 1, 1),
    ("kurtosis", _peak("kurtosis"), 1, 1),
    ("int8 dynamic, perplexity + %", _int8_loss("dynamic"), 2, 100),
    ("int8 static, perplexity + %", _int8_loss("static"), 2, 100),
]


def _table(size: _Size) -> str:
    rows = []
    for kind in size.records:
        cells = [
            "–" if (value := size.of(kind, measure)) is None else value.text(digits, scale)
            for _, measure, digits, scale in _COLUMNS
        ]
        rows.append([LABELS[kind], *cells])
    one = next(iter(size.records.values()))[0]
    return (
        f"**{size.title}**, {one['steps']:,} steps of {one['batch_size']} sequences of {one['context']} tokens, "
        f"learning rate {one['learning_rate']:g}: even attention would give the first token "
        f"{100 * size.even:.1f} %.\n\n"
        + table(["attention", *(head for head, *_ in _COLUMNS)], rows)
    )


def _claims(sizes: list[_Size]) -> list[Claim]:
    return [
        _claim("Softmax gives disproportionate attention to the first token.", sizes, _judge_sink),
        _claim("StableMask mends it.", sizes, _judge_mended),
        _claim("Delimiters receive less attention with StableMask.", sizes, _judge_delimiters),
        _claim("Hidden states have smaller outliers with StableMask.", sizes, _judge_outliers),
        _claim("Static int8 costs less perplexity with StableMask.", sizes, _judge_int8),
    ]


def _claim(
    statement: str, sizes: list[_Size], judge: Callable[[_Size], tuple[str, Verdict]]
) -> Claim:
    judged = [(size.title, *judge(size)) for size in sizes]
    measured = "; ".join(f"{title}: {text}" for title, text, _ in judged)
    return Claim(statement, measured, _joint([verdict for *_, verdict in judged]))


def _joint(verdicts: Sequence[Verdict]) -> Verdict:
    """What is open decides nothing, and those that disagree make a part."""
    decided = {verdict for verdict in verdicts if verdict != "open"}
    if not decided:
        return "open"
    return decided.pop() if len(decided) == 1 else "partly reproduced"


def _is_lower(one: Estimate | None, other: Estimate | None) -> Verdict:
    """Whether ``one`` is below ``other``: their intervals apart, or at most half for a single seed."""
    if one is None or other is None:
        return "open"
    if math.isnan(one.half_width) or math.isnan(other.half_width):
        if 2 * one.mean <= other.mean:
            return "reproduced"
        return "not reproduced" if one.mean >= 2 * other.mean else "open"
    return "reproduced" if one.high < other.low else "not reproduced"


def _has_sink(size: _Size) -> bool:
    largest = size.of("softmax", _peak("first_token_head"))
    return largest is not None and largest.mean >= SINK * size.even


def _judge_sink(size: _Size) -> tuple[str, Verdict]:
    largest = size.of("softmax", _peak("first_token_head"))
    if largest is None:
        return "softmax was not trained", "open"
    text = (
        f"the head with the most gives it {largest.text(1, 100)} %, "
        f"even attention {100 * size.even:.1f} %"
    )
    return text, "reproduced" if _has_sink(size) else "open"


def _judge_mended(size: _Size) -> tuple[str, Verdict]:
    if not _has_sink(size):
        return "softmax grew no sink that could be mended", "open"
    names = ("first_token_head", "first_token_real_head")
    text = " and ".join(
        f"{_pair(size, _peak(name), 1, 100)} % of {what} attention"
        for name, what in zip(names, ("all", "real"), strict=True)
    )
    return text, _joint([_compare(size, _peak(name)) for name in names])


def _judge_delimiters(size: _Size) -> tuple[str, Verdict]:
    measure = _peak("delimiters")
    return f"{_pair(size, measure, 2)} times even attention", _compare(size, measure)


def _judge_outliers(size: _Size) -> tuple[str, Verdict]:
    text = (
        f"largest activation {_pair(size, _peak('largest'), 1)}, "
        f"kurtosis {_pair(size, _peak('kurtosis'), 1)}"
    )
    return text, _joint([_compare(size, _peak(name)) for name in ("largest", "kurtosis")])


def _judge_int8(size: _Size) -> tuple[str, Verdict]:
    measure = _int8_loss("static")
    return f"+{_pair(size, measure, 2, 100)} %", _compare(size, measure)


def _compare(size: _Size, measure: Measure) -> Verdict:
    return _is_lower(size.of("stablemask", measure), size.of("softmax", measure))


def _pair(size: _Size, measure: Measure, digits: int, scale: float = 1) -> str:
    one, other = (size.of(kind, measure) for kind in ("stablemask", "softmax"))
    texts = ("not measured" if v is None else v.text(digits, scale) for v in (one, other))
    return " against softmax's ".join(texts)


def _steps_figure(sizes: list[_Size]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(5.4, 4.2 * len(sizes)), 3.8), layout="constrained")
    panels = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
    for size, axes in zip(sizes, panels, strict=True):
        for kind, records in size.records.items():
            curves = [record["curve"] for record in records]
            _line(axes, kind, curves[0]["step"], [curve["first_token_head"] for curve in curves])
        _even(axes, 100 * size.even)
        axes.set(title=size.title, xlabel="training step")
    panels[0].set_ylabel("attention on the first token,\nlargest head (%)")
    _legend(figure, panels[0])
    return figure


def _layers_figure(sizes: list[_Size]) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    panels = (
        ("first_token_head", 100.0, "first token, largest head (%)"),
        ("first_token_real", 100.0, "first token, real attention (%)"),
        ("delimiters", 1.0, "delimiters (× even attention)"),
    )
    figure = Figure(figsize=(10, 3.6 * len(sizes)), layout="constrained")
    grid = figure.subplots(len(sizes), len(panels), squeeze=False)
    for size, row in zip(sizes, grid, strict=True):
        for axes, (name, scale, label) in zip(row, panels, strict=True):
            for kind, records in size.records.items():
                values = [record[name] for record in records]
                _line(axes, kind, list(range(len(values[0]))), values, scale)
            _even(axes, 100 * size.even if scale == 100 else 1)
            axes.set(xlabel="layer", ylabel=label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        row[0].set_title(size.title)
    _legend(figure, grid[0, 0])
    return figure


def _line(
    axes: Axes, kind: str, x: list[int], seeds: list[list[float]], scale: float = 100
) -> None:
    """The mean over seeds, and a band from the lowest to the highest."""
    values = scale * np.array(seeds)
    style: dict[str, Any] = {**line_style(kind)}
    axes.plot(x, values.mean(0), label=LABELS[kind], markevery=max(1, len(x) // 8), **style)
    if len(seeds) > 1:
        axes.fill_between(x, values.min(0), values.max(0), color=style["color"], alpha=0.12, lw=0)


def _even(axes: Axes, level: float) -> None:
    axes.axhline(level, color=GRAY, ls=":", lw=1.4, label="even attention")
    axes.set_ylim(bottom=0)


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)


STUDY = Study("sinks", "Attention sinks", jobs, section)
