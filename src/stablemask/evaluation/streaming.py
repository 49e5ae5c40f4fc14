"""How well a model reads a long text from a bounded cache: its loss by position, and StreamingLLM.

StreamingLLM (Xiao et al., arXiv 2309.17453) is here to compare with: beside the latest keys it keeps
those of the first tokens, which models trained with softmax use as attention sinks, and counts
positions within the cache.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..bars import progress_bar
from ..errors import InputError
from ..inference.model import check_token_ids, evaluating
from ..inference.streaming import cached_logits, mass_held, window_cache
from ..models import StableMaskConfig
from ..models.cache import CACHE
from ..models.positions import Rotary, rotary_angles, rotate
from .perplexity import LOGITS_PER_BATCH, check_sequences, with_prefix


def streaming_losses(
    model: PreTrainedModel,
    tokens: Tensor,
    cache: Cache,
    *,
    chunk_size: int,
    prefix: int | None = None,
    progress: bool = True,
) -> Tensor:
    """Read texts from their first token to their last with the given cache.

    Args:
        tokens: (batch, length), without padding.
        cache: an empty one: ``DynamicCache`` for all keys, ``window_cache``, or ``sink_cache``.
        chunk_size: tokens of a forward pass; 1 for ``sink_cache``.
        prefix: token id to read in front of the texts, unless they begin with it.

    Returns:
        Nats of each token but the first, float32 (batch, length - 1), on the CPU.
    """
    length = tokens.shape[1]
    tokens = with_prefix(tokens, prefix)
    check_token_ids(model, tokens)
    losses = []
    with (
        evaluating(model),
        progress_bar(total=tokens.shape[1] - 1, unit="tok", leave=False, show=progress) as bar,
    ):
        chunks = tokens[:, :-1].split(chunk_size, 1)
        targets = tokens[:, 1:].split(chunk_size, 1)
        for chunk, target in zip(chunks, targets, strict=True):
            logits = cached_logits(model, chunk.to(model.device), cache).float()
            nats = F.cross_entropy(
                logits.transpose(1, 2), target.to(model.device), reduction="none"
            )
            losses.append(nats.cpu())
            bar.update(chunk.shape[1])
    return torch.cat(losses, dim=1)[:, -(length - 1) :]


@dataclass(frozen=True)
class StreamingLosses:
    """Mean nats of the later tokens of texts, by what a token sees of those before it.

    Attributes:
        full: all of them.
        window: the latest of a window, and nothing else.
        sinks: the first few and the latest, a window in all: StreamingLLM.
    """

    full: float
    window: float
    sinks: float


def compare_streaming(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    window: int,
    scored_from: int,
    num_sinks: int = 4,
    prefix: int | None = None,
    progress: bool = True,
) -> StreamingLosses:
    """Read texts with all their keys, with a window of the latest, and by StreamingLLM.

    StableMask's mass is held at that of the window's last position, as in ``generate``.

    Args:
        tokens: (batch, length), without padding.
        window: keys that a token sees, its own included.
        scored_from: the first position that is scored, 1 to ``length - 1``; the prefix has none.
        num_sinks: tokens that StreamingLLM keeps, of which the prefix is the first.
        prefix: as in :func:`streaming_losses`.

    Raises:
        InputError: ``scored_from`` is out of its range, or see :func:`window_cache`, :func:`sink_cache`.
    """
    check_sequences(model, tokens, prefix)
    if not 1 <= scored_from < tokens.shape[1]:
        raise InputError(f"scored_from must be from 1 to {tokens.shape[1] - 1}, got {scored_from}")
    vocabulary = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    chunk = min(window, max(1, LOGITS_PER_BATCH // (len(tokens) * vocabulary)))

    def nats(cache: Cache, chunk_size: int) -> float:
        losses = streaming_losses(
            model, tokens, cache, chunk_size=chunk_size, prefix=prefix, progress=progress
        )
        return losses[:, scored_from - 1 :].double().mean().item()

    full = nats(DynamicCache(config=model.config), chunk)
    with mass_held(model, window):
        of_window = nats(window_cache(model, window), chunk)
    return StreamingLosses(full, of_window, nats(sink_cache(model, window, num_sinks=num_sinks), 1))


def position_bins(length: int, per_octave: int = 2, first: int = 1) -> list[tuple[int, int]]:
    """Ranges of positions from ``first`` to ``length``, ``per_octave`` to each doubling."""
    edges = [first]
    while edges[-1] < length:
        edges.append(min(length, max(edges[-1] + 1, round(edges[-1] * 2 ** (1 / per_octave)))))
    return list(pairwise(edges))


def mean_and_error(losses: Tensor) -> tuple[float, float]:
    """The mean of (texts, positions), and its standard error, each text one observation."""
    by_text = losses.double().mean(dim=1)
    return by_text.mean().item(), (by_text.std() / len(by_text) ** 0.5).item()


def sink_cache(model: PreTrainedModel, window: int, *, num_sinks: int = 4) -> DynamicCache:
    """StreamingLLM's cache: the first ``num_sinks`` keys and the latest ones, ``window`` in all.

    A key's position is its place in the cache, so tokens are read one at a time. For our decoder a
    pseudo mass too is that of the place, at most ``window - 1``; with ``num_sinks=0`` this is the
    plain window with the mass kept from falling further.

    Raises:
        InputError: ``window`` leaves no room beside the sinks, or the model's positions cannot be
            counted anew.
    """
    if not 0 <= num_sinks < window - 1:
        raise InputError(f"num_sinks must be from 0 to the window of {window} less 2")
    config = model.config.get_text_config(decoder=True)
    encoding = getattr(config, "position_encoding", "rope")
    if encoding not in ("rope", "alibi", "nope"):
        raise InputError(f"{encoding} positions cannot be counted anew within a cache")
    kinds = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    backs = [None] * len(kinds) if encoding != "rope" else _backs(model, config, kinds)
    cache = DynamicCache()
    cache.layers = [AttentionSinkLayer(window, num_sinks, back) for back in backs]
    return cache


def _backs(model: PreTrainedModel, config: Any, kinds: list[str | None]) -> list[Rotary | None]:
    """What turns a key one place back, by layer; None for a layer whose keys have no positions."""
    head_dim = getattr(config, "head_dim", None)
    head_dim = head_dim or config.hidden_size // config.num_attention_heads
    one_back = torch.tensor([[-1]], device=model.device)
    angles: dict[str | None, Rotary] = {}
    for kind in kinds:  # which may have frequencies of their own
        parameters = getattr(config, "rope_parameters", None) or {}
        parameters = parameters.get(kind, parameters)
        whole = parameters.get("partial_rotary_factor", 1.0) == 1.0
        if parameters.get("rope_type") != "default" or not whole:
            raise InputError(
                "positions within a cache need RoPE of the default type, of whole heads"
            )
        angles[kind] = rotary_angles(one_back, head_dim, parameters["rope_theta"])
    if isinstance(config, StableMaskConfig):
        return [angles[kind] for kind in kinds]
    # Which layers have it, and which features are pairs, no configuration says alike: the keys do.
    backs: list[Rotary | None] = []
    for kind, before, key in zip(kinds, _keys_at(model, 16), _keys_at(model, 17), strict=True):
        if _alike(key, before):
            backs.append(None)
        elif _alike(rotate(key, *angles[kind]), before):
            backs.append(angles[kind])
        else:
            raise InputError(
                f"the RoPE of {type(model).__name__} cannot be counted anew within a cache"
            )
    return backs


def _keys_at(model: PreTrainedModel, position: int) -> list[Tensor]:
    """Of some tokens by layer, each a text by itself: but for their positions, all are the same."""
    cache: Any = DynamicCache()
    ids = torch.arange(8, device=model.device)[:, None]
    with evaluating(model), mass_held(model, 1):
        model(
            input_ids=ids,
            position_ids=torch.full_like(ids, position),
            use_cache=True,
            **{CACHE: cache},
        )
    return [layer.keys for layer in cache.layers]


def _alike(one: Tensor, other: Tensor) -> bool:
    """Up to rounding in half precision; a turn by one place changes the fastest features by their size."""
    return bool((one - other).abs().max() <= 0.05 * other.abs().max())


class AttentionSinkLayer(DynamicLayer):
    """Holds at most ``window - 1`` keys between steps, each rotated by its place."""

    def __init__(self, window: int, num_sinks: int, back: Rotary | None):
        super().__init__()
        self.window = window
        self.num_sinks = num_sinks
        self.back = back

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        if key_states.shape[2] > 1:
            raise ValueError("places in the cache move with each token: read them one at a time")
        keys, values = super().update(key_states, value_states)
        if keys.shape[2] == self.window:
            self.keys = self._without_oldest(keys, self.back)
            self.values = self._without_oldest(values)
        return keys, values

    def _without_oldest(self, states: Tensor, back: Rotary | None = None) -> Tensor:
        sinks, latest = states[:, :, : self.num_sinks], states[:, :, self.num_sinks + 1 :]
        if back is not None:
            latest = rotate(latest, *back)
        return torch.cat((sinks, latest), dim=2)
