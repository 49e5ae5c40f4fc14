"""Perplexity of a text by a strided sliding window, at any window length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from ..bars import progress_bar
from ..errors import InputError
from ..inference.model import check_length, check_token_ids, evaluating, last_logits

# Logits of one batch hold at most so many numbers, 256 MiB in float32.
LOGITS_PER_BATCH = 2**26
MAX_WINDOWS_PER_BATCH = 64


def perplexity_of(nats: float) -> float:
    """The perplexity of a mean loss in nats a token: ``exp(nats)``, infinite where no float holds it (709.8)."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def perplexity_text(perplexity: float, digits: int = 2) -> str:
    """A perplexity to read: so many decimals, or three digits and a power of ten from ten million on."""
    return f"{perplexity:.{digits}f}" if perplexity < 1e7 else f"{perplexity:.3g}"


@dataclass(frozen=True)
class PerplexityResult:
    """``perplexity`` is ``perplexity_of(nats_per_token)``, the mean over the ``tokens`` scored."""

    length: int
    stride: int
    tokens: int
    perplexity: float
    nats_per_token: float
    bits_per_byte: float | None


def perplexity(
    model: PreTrainedModel,
    tokens: Sequence[int] | np.ndarray | Tensor,
    *,
    length: int,
    stride: int | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    bytes_per_token: float | None = None,
    progress: bool = True,
) -> PerplexityResult:
    """Score a text with windows of ``length`` tokens that advance by ``stride``.

    Every window is read from its own first token, at position 0. It scores the tokens that no
    earlier window has scored, so each token is scored once, with at least ``length - stride``
    tokens before it (but for the first window's). The last window is moved back to end with the
    text. A window cannot score its first token: with ``stride == length`` those are left out, and
    the result is the mean of the usual training loss over blocks.

    Args:
        model: any causal language model of Transformers.
        tokens: ids, ``(num_tokens,)``.
        length: tokens a window sees, at least 2.
        stride: new tokens a window scores, 1 to ``length``; default ``length // 2``.
        batch_size: windows in a batch; by default as many as the size of the logits allows.
        max_tokens: read so many tokens of the text at most.
        bytes_per_token: mean UTF-8 bytes of a token, for bits per byte.
        progress: show a bar with the time left, where stderr is a terminal.

    Raises:
        InputError: an argument is out of its range, the text is shorter than a window, a window is
            longer than a learned position table, or the loss is not finite.
    """
    if length < 2:
        raise InputError(f"length must be at least 2, got {length}")
    stride = length // 2 if stride is None else stride
    if not 1 <= stride <= length:
        raise InputError(f"stride must be from 1 to the length of {length}, got {stride}")
    for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    check_length(model, length, f"a window of {length} tokens")
    ids = _as_ids(tokens, max_tokens)
    if len(ids) < length:
        raise InputError(
            f"the text has {len(ids)} tokens, less than a window of {length}; "
            "give more text or a shorter length"
        )
    check_token_ids(model, ids)

    starts = [*range(0, len(ids) - length, stride), len(ids) - length]
    ends = [start + length for start in starts]
    new = [end - last for end, last in zip(ends, [0, *ends], strict=False)]
    scored = [min(count, length - 1) for count in new]
    if batch_size is None:
        batch_size = min(_fitting(model, length), MAX_WINDOWS_PER_BATCH)

    total = 0.0
    with (
        evaluating(model),
        progress_bar(
            total=sum(scored),
            desc=f"length {length}",
            unit="tok",
            unit_scale=True,
            leave=False,
            show=progress,
        ) as bar,
    ):
        for i in range(0, len(starts), batch_size):
            windows = torch.stack([ids[s : s + length] for s in starts[i : i + batch_size]])
            counts = scored[i : i + batch_size]
            total += _sum_of_losses(model, windows.to(model.device), counts)
            bar.update(sum(counts))

    nats = total / sum(scored)
    if not math.isfinite(nats):
        raise InputError(
            f"the model's loss is {nats} at length {length}; its weights are damaged, "
            "or its dtype overflows"
        )
    return PerplexityResult(
        length=length,
        stride=stride,
        tokens=sum(scored),
        perplexity=perplexity_of(nats),
        nats_per_token=nats,
        bits_per_byte=nats / math.log(2) / bytes_per_token if bytes_per_token else None,
    )


def token_losses(model: PreTrainedModel, ids: Tensor, prefix: int | None = None) -> Tensor:
    """Negative log-likelihood of each token but the first of its sequence, in nats.

    Args:
        ids: sequences without padding, (batch, n) with n of at least 2.
        prefix: token id to read in front of the sequences; the tokens that are scored are the same.

    Returns:
        float32 (batch, n - 1), on the CPU.

    Raises:
        InputError: the shape is another, or the ids do not fit the model.
    """
    check_sequences(model, ids, prefix)
    length = ids.shape[1]
    losses = []
    with evaluating(model):
        for batch in ids.split(_fitting(model, length)):
            read = with_prefix(batch, prefix).to(model.device)
            losses.append(_last_losses(model, read, length - 1).cpu())
    return torch.cat(losses)


def _fitting(model: PreTrainedModel, length: int) -> int:
    """How many sequences of so many tokens a batch may hold for its logits."""
    vocabulary = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    return max(1, LOGITS_PER_BATCH // (length * vocabulary))


def _last_losses(model: PreTrainedModel, ids: Tensor, count: int) -> Tensor:
    """Negative log-likelihood of the last tokens of each sequence, in nats, float32 (batch, count)."""
    options = last_logits(model, count + 1)
    logits = model(input_ids=ids, use_cache=False, **options).logits[:, -count - 1 : -1]
    targets = ids[:, -count:].flatten()
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets, reduction="none")
    return losses.view(len(ids), count)


def with_prefix(ids: Tensor, prefix: int | None) -> Tensor:
    """(batch, n + 1) with the prefix in front, or ``ids`` where there is none or all begin with it."""
    if prefix is None or bool((ids[:, 0] == prefix).all()):
        return ids
    return F.pad(ids, (1, 0), value=prefix)


def check_sequences(model: PreTrainedModel, ids: Tensor, prefix: int | None = None) -> None:
    """Raise InputError for ids that are not (batch, n), n of at least 2, or do not fit the model."""
    if ids.dim() != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise InputError(f"ids must be (batch, n) with n of at least 2, got {tuple(ids.shape)}")
    length = ids.shape[1] + (prefix is not None)
    check_length(model, length, f"a sequence of {length} tokens")
    check_token_ids(model, ids)
    if prefix is not None:
        check_token_ids(model, [prefix])


def _as_ids(tokens: Sequence[int] | np.ndarray | Tensor, max_tokens: int | None) -> Tensor:
    if not isinstance(tokens, Tensor):
        # Cut first: the array may be a memory map of a large file.
        tokens = torch.from_numpy(np.asarray(tokens)[:max_tokens].astype(np.int64))
    if tokens.dim() != 1:
        raise InputError(f"tokens must be (num_tokens,), got shape {tuple(tokens.shape)}")
    return tokens[:max_tokens].to("cpu", torch.int64)


def _sum_of_losses(model: PreTrainedModel, windows: Tensor, counts: list[int]) -> float:
    """Negative log-likelihood of the last ``counts[i]`` tokens of each window ``i``, in nats."""
    losses = _last_losses(model, windows, max(counts))
    first = max(counts) - torch.tensor(counts, device=losses.device)
    is_scored = torch.arange(max(counts), device=losses.device) >= first[:, None]
    return losses[is_scored].double().sum().item()
