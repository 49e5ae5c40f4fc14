"""Attention sinks: whether they grow, on what, and what they cost a quantised model."""

from __future__ import annotations

import copy
import string
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import get_cosine_with_min_lr_schedule_with_warmup

from stablemask.data import PackedDataset, prepare_corpus
from stablemask.data.batches import Shuffle
from stablemask.evaluation.activations import hidden_state_outliers
from stablemask.evaluation.attention_maps import LayerAttention, reduce_attention
from stablemask.evaluation.perplexity import perplexity
from stablemask.evaluation.quantization import quantize_int8
from stablemask.models import StableMaskForCausalLM
from stablemask.models.configuration import preset_config
from stablemask.models.presets import PRESETS

from .kinds import KINDS, config_fields
from .study import SOURCE, Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAIR = ("softmax", "stablemask")
# How a block begins: where the text was cut, or with the end of a document.
CUT, END = "cut", "end"


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
        # The smallest model in which softmax was seen to grow a sink, and a rate at which it does so
        # in few steps, whatever the seed (docs/log/2026-11.md).
        sizes = {"vocab_size": 512, "max_position_embeddings": 256}
        options = {"preset": "nano", "steps": 2000, "batch_size": 4, "learning_rate": 1e-2, **sizes}
        plans = [
            ({"start": END, **options}, KINDS, seeds, 115),
            ({"start": CUT, **options}, PAIR, seeds, 115),
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
    delimiters = delimiters_of(corpus.tokenizer)
    validation = blocks_of(corpus.validation, blocks, first)
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

    def perplexity_of(model: PreTrainedModel) -> float:
        ids = validation.flatten()
        return perplexity(model, ids, length=context, stride=context, progress=False).perplexity

    outliers = hidden_state_outliers(model, validation)
    return {
        "context": context,
        "curve": curve,
        **attention_by_layer(model, validation, delimiters),
        "largest": outliers.largest.tolist(),
        "kurtosis": outliers.kurtosis.tolist(),
        "perplexity": perplexity_of(model),
        **_int8(model, blocks_of(corpus.train, 32, first), perplexity_of),
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
    model.chunked_loss = True
    model.train()
    for step in range(steps):
        if step % max(1, steps // 20) == 0:
            watch(step)
        drawn = range(step * batch_size, (step + 1) * batch_size)
        ids = _blocks(data, [order[k] for k in drawn], first).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=on_gpu):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
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


def blocks_of(data: PackedDataset, blocks: int, first: int | None = None) -> Tensor:
    """Blocks from the beginning of the data to its end, (blocks, n)."""
    indices = np.linspace(0, len(data) - 1, min(blocks, len(data)), dtype=int)
    return _blocks(data, indices.tolist(), first)


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


def delimiters_of(tokenizer: PreTrainedTokenizerBase) -> Tensor:
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
