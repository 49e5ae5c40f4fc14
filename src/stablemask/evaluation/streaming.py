"""How well a model reads a long text from a bounded cache: its loss by position, and StreamingLLM.

StreamingLLM (Xiao et al., arXiv 2309.17453) is here to compare with: beside the latest keys it keeps
those of the first tokens, which models trained with softmax use as attention sinks, and counts
positions within the cache.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..bars import progress_bar
from ..errors import InputError
from ..inference.model import check_token_ids, evaluating
from ..inference.streaming import cached_logits
from ..models.positions import Rotary, rotary_angles, rotate


def streaming_losses(
    model: PreTrainedModel, tokens: Tensor, cache: Cache, *, chunk_size: int, progress: bool = True
) -> Tensor:
    """Read texts from their first token to their last with the given cache.

    Args:
        tokens: (batch, length), without padding.
        cache: an empty one: ``DynamicCache`` for all keys, ``window_cache``, or ``sink_cache``.
        chunk_size: tokens of a forward pass; 1 for ``sink_cache``.

    Returns:
        Nats of each token but the first, float32 (batch, length - 1), on the CPU.
    """
    check_token_ids(model, int(tokens.max()))
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
    return torch.cat(losses, dim=1)


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
    back = None
    if encoding == "rope":
        parameters = config.rope_parameters
        if parameters is None or parameters["rope_type"] != "default":
            raise InputError("positions within a cache need RoPE of the default type")
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        one_back = torch.tensor([[-1]], device=model.device)
        back = rotary_angles(one_back, head_dim, parameters["rope_theta"])
    cache = DynamicCache()
    cache.layers = [
        AttentionSinkLayer(window, num_sinks, back) for _ in range(config.num_hidden_layers)
    ]
    return cache


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
