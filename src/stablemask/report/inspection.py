"""What an inspection shows of one model on one text, measured, as plain data.

Shapes: L layers, H heads, n tokens, s pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..bars import progress_bar
from ..errors import InputError
from ..evaluation.activations import HiddenStateOutliers, capture_outliers
from ..evaluation.attention_maps import LayerAttention, capture_attention
from ..evaluation.perplexity import check_sequences, perplexity_of, token_losses, with_prefix
from ..evaluation.sinks import LayerStatistics
from ..hf.settings import model_settings
from ..inference.model import check_unicode
from ..models import StableMaskConfig

MAX_TOKENS = 1024
# What the maps of a page may take, in bytes of its file; the rest of it is some hundred KB.
MAP_BYTES = 6 * 2**20
# Of one map, measured: half a byte a pixel, in base64, and what every PNG begins and ends with.
_BYTES_PER_PIXEL, _BYTES_PER_MAP = 0.5, 400
# A pixel is one of so many shades, even in the square root of the share; the next is the future's.
SHADES = 63


@dataclass(frozen=True)
class HeadMaps:
    """Attention of the heads of a layer in shades 0 to ``SHADES - 1``, of shares 0 to 1.

    Attributes:
        real: of row by column, (H, s, s), uint8; ``SHADES`` in the future.
        pseudo: of each row, (H, s), uint8.
    """

    real: np.ndarray
    pseudo: np.ndarray


@dataclass(frozen=True)
class Inspection:
    """One model on one text.

    Attributes:
        attention: its kind, as ``StableMaskConfig.attention`` names them.
        settings: its ``config.stablemask`` with defaults, or None.
        tokens: text of each token that was read, the first of ``total_tokens``.
        prefix: text of the first of them where it was put in front of the text, or None.
        perplexity: of the text's tokens but the first.
        layers: statistics of each layer that has attention.
        maps: attention of the same layers; a pixel holds the largest share among ``block`` by
            ``block`` tokens.
        outliers: of the hidden states behind each decoder layer.
    """

    label: str
    family: str
    attention: str
    settings: dict[str, Any] | None
    parameters: int
    dtype: str
    tokens: list[str]
    prefix: str | None
    total_tokens: int
    perplexity: float
    layers: list[LayerStatistics]
    maps: list[HeadMaps]
    block: int
    outliers: HiddenStateOutliers

    @property
    def text_tokens(self) -> list[str]:
        return self.tokens if self.prefix is None else self.tokens[1:]

    @property
    def first_token(self) -> float:
        """Mean attention on token 0 over layers and heads."""
        return float(torch.cat([layer.first_token for layer in self.layers]).mean())

    @property
    def pseudo(self) -> float:
        """Mean mask ratio over layers, heads and rows."""
        return float(torch.cat([layer.pseudo for layer in self.layers]).mean())


def inspect_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    label: str,
    max_tokens: int = 64,
    prefix: int | None = None,
    special_tokens: bool = True,
    map_bytes: int = MAP_BYTES,
) -> Inspection:
    """Read a text with a model and see where its attention goes.

    Args:
        model: ours, or any decoder whose attention goes through Transformers' attention interface.
        text: at least 2 tokens, of which the first ``max_tokens`` are read.
        label: what to call the model.
        prefix: token id to read in front of the text, where a softmax model has its sink.
        special_tokens: whether the text gets those that its tokenizer puts around one.
        map_bytes: how much of the page its attention maps may take; long texts of models with many
            heads are drawn in blocks of tokens.

    Raises:
        InputError: the text is too short or not Unicode, ``max_tokens`` is not from 2 to 1024 or more than the model
            can read, or the model's attention cannot be captured.
    """
    if not 2 <= max_tokens <= MAX_TOKENS:
        raise InputError(f"max_tokens must be from 2 to {MAX_TOKENS}, got {max_tokens}")
    check_unicode(text, "the text")
    every: list[int] = tokenizer(text, add_special_tokens=special_tokens)["input_ids"]
    text_ids = torch.tensor(every[:max_tokens])
    if len(text_ids) < 2:
        count = f"{len(text_ids)} token{'s' * (len(text_ids) != 1)}"
        raise InputError(f"the text has {count} for {label}; give at least 2")
    check_sequences(model, text_ids[None], prefix)
    ids = with_prefix(text_ids[None], prefix)[0]
    added = len(ids) - len(text_ids)
    config: Any = model.config.get_text_config(decoder=True)
    num_layers = config.num_hidden_layers
    block = _block(len(ids), num_layers * config.num_attention_heads, map_bytes)

    layers: list[LayerStatistics] = []
    maps: list[HeadMaps] = []
    with progress_bar(total=num_layers, desc=label, unit="layer") as bar:

        def record(attention: LayerAttention) -> None:
            layers.append(LayerStatistics.of(attention))
            maps.append(_head_maps(attention, block))
            bar.update()

        with capture_outliers(model) as outliers:
            losses = token_losses(model, text_ids[None], prefix)
        with capture_attention(model, record):
            captured = token_losses(model, text_ids[None], prefix)
    _check_capture(label, model, losses, captured)
    return Inspection(
        label=label,
        family=config.model_type,
        attention=_attention_kind(config, layers),
        settings=_settings(config),
        parameters=model.num_parameters(),
        dtype=str(model.dtype).removeprefix("torch."),
        tokens=[str(tokenizer.decode([token])) for token in ids.tolist()],
        prefix=str(tokenizer.decode(ids[:1])) if added else None,
        total_tokens=len(every) + added,
        perplexity=perplexity_of(losses.mean().item()),
        layers=layers,
        maps=maps,
        block=block,
        outliers=outliers(),
    )


def _block(length: int, heads: int, map_bytes: int) -> int:
    """How many tokens share a pixel for all maps together to keep to ``map_bytes``."""
    pixels = max((map_bytes / heads - _BYTES_PER_MAP) / _BYTES_PER_PIXEL, 16**2)
    return math.ceil(length / int(pixels**0.5))


def _head_maps(attention: LayerAttention, block: int) -> HeadMaps:
    real = F.max_pool2d(attention.real, block, ceil_mode=True)[0]
    pseudo = F.max_pool1d(attention.pseudo, block, ceil_mode=True)[0]
    future = torch.ones(real.shape[-2:], dtype=torch.bool).triu(1).numpy()
    return HeadMaps(np.where(future, np.uint8(SHADES), _shade(real)), _shade(pseudo))


def _shade(share: Tensor) -> np.ndarray:
    shade = share.float().cpu().clamp(0, 1).sqrt() * (SHADES - 1)
    return shade.round().to(torch.uint8).numpy()


def _check_capture(label: str, model: PreTrainedModel, losses: Tensor, captured: Tensor) -> None:
    """Refuse a model whose captured attention is not the one that it runs."""
    if not losses.isfinite().all():
        raise InputError(
            f"the model's loss is not finite on this text; the weights of {label} are damaged, or "
            "their dtype overflows"
        )
    # Rounding alone moves a token's loss too: SmolLM2-135M's by 5e-6 in float32, 0.07 in bfloat16.
    allowed = 0.01 if model.dtype in (torch.float32, torch.float64) else 0.3
    difference = (losses - captured).abs().mean().item()
    if not difference <= allowed:
        raise InputError(
            f"the attention of {type(model).__name__} cannot be captured: computed from what reaches "
            f"Transformers' attention interface, it changes the loss by {difference:.2g} nats a token"
        )


def _attention_kind(config: Any, layers: Sequence[LayerStatistics]) -> str:
    if isinstance(config, StableMaskConfig):
        return config.attention
    if _settings(config) is not None:
        return "stablemask"
    return "learned-sink" if any(layer.pseudo.any() for layer in layers) else "softmax"


def _settings(config: Any) -> dict[str, Any] | None:
    given = getattr(config, "stablemask", None)
    return (
        given if given is None or isinstance(config, StableMaskConfig) else model_settings(config)
    )
