"""The ways a model is told where a token stands, each a few lines."""

from typing import Any

import torch
from torch import Tensor

from ..backends import hardware
from .configuration import StableMaskConfig
from .kept import rates_on_device, shifts_on_device
from .mass import sink_logits_at
from .presets import FRONT_TOKENS
from .settings import complete_settings, pseudo_sink_logits, without_shift

Rotary = tuple[Tensor, Tensor]


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> Rotary:
    """cos and sin of RoPE (Su et al., arXiv 2104.09864), as :func:`rotate` takes them.

    Returns:
        Two float32 tensors (batch or 1, 1, length, head_dim), the sines of the first half negated.
    """
    frequencies = _inverse_frequencies(head_dim, theta, positions.device)
    angles = positions[:, None, :, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (batch, heads, length, head_dim), its two halves paired, in float32 or better."""
    halves_swapped = states.roll(states.shape[-1] // 2, dims=-1)
    return torch.addcmul(states * cos, halves_swapped, sin).to(states.dtype)


def sinusoidal_encoding(positions: Tensor, hidden_size: int) -> Tensor:
    """Sine and cosine in turn (Vaswani et al., 3.5): float32 (batch or 1, length, hidden)."""
    angles = positions[..., None] * _inverse_frequencies(hidden_size, 1e4, positions.device)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def alibi_mask(slopes: Tensor, attn_mask: Tensor, past_length: int | Tensor) -> Tensor:
    """ALiBi added to a mask whose first query row is key ``past_length``, float32.

    Args:
        slopes: (heads,).
        attn_mask: bool or additive, (batch, 1 or heads, length, keys).
    """
    rows = past_length + torch.arange(attn_mask.shape[2], device=slopes.device)
    distance = rows[:, None] - torch.arange(attn_mask.shape[3], device=slopes.device)
    bias = -slopes[:, None, None] * distance
    if attn_mask.dtype == torch.bool:
        return torch.where(attn_mask, bias, -torch.inf)
    return bias + attn_mask


def check_table(positions: Tensor, table_length: int, length: int | Tensor | None = None) -> None:
    """Refuse positions past a learned table; a graph cannot look, and fails at the lookup.

    Args:
        length: none of the positions reaches it; None where that is not known. Looking at them waits for
            the device.
    """
    if torch.compiler.is_compiling() or hardware.is_capturing(positions):
        return
    if not (isinstance(length, int) and length <= table_length):
        check_length(int(positions.max()) + 1, table_length)


def check_length(length: int, table_length: int) -> None:
    """Refuse a sequence longer than a learned table."""
    if length > table_length:
        raise ValueError(
            f"a sequence of {length} tokens is longer than the learned position table of "
            f"{table_length} (max_position_embeddings); shorten it, or use a model with another "
            "position encoding"
        )


def _inverse_frequencies(dim: int, theta: float, device: torch.device) -> Tensor:
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def position_sink_logits(
    config: StableMaskConfig,
    positions: Tensor,
    log_gamma: Tensor | None = None,
    trained_shift: bool = False,
) -> list[Tensor | None]:
    """Sink logits of each layer that follow from positions, broadcastable to (batch, heads, length).

    None for ``learned-sink``, where each layer holds its own. A shift that layers train is theirs to add, and
    so is the score of a key that they hold.

    Args:
        positions: int, (batch or 1, length).
        log_gamma: logarithm of the learned decay rates, (layers, heads), where there are any.
        trained_shift: whether the layers hold their shifts.
    """
    layers = range(config.num_hidden_layers)

    def constant(value: float) -> Tensor:
        return torch.full((1, 1, 1), value, device=positions.device)

    if config.attention == "learned-sink":
        return [None for _ in layers]
    if config.attention != "stablemask":
        same = constant(-torch.inf)
        if config.attention in ("softmax1", "key-sink", *FRONT_TOKENS):
            same = constant(0.0)
        if config.attention in FRONT_TOKENS and config.position_encoding == "alibi":
            slopes = rates_on_device("slopes", config.num_attention_heads, positions)
            same = -slopes.to(positions.device)[:, None] * (positions[:, None] + 1)
        return [same for _ in layers]
    settings, heads = config.stablemask, config.num_attention_heads
    assert settings is not None

    def complete() -> dict[str, Any]:
        checked = complete_settings(settings, heads, None, len(layers), own_decoder=True)
        return without_shift(checked) if apart else checked

    listed = isinstance(settings.get("shift"), (list, tuple)) and not trained_shift
    apart = listed or trained_shift
    of_all = without_shift(settings) if apart else settings
    masses: list[Any]
    if log_gamma is None:
        given = {name: value for name, value in of_all.items() if name != "layers"}
        shared = sink_logits_at(given, heads, lambda: None, positions, complete)
        if shared is None:
            shared = pseudo_sink_logits(of_all, heads, positions)
        masses = [shared for _ in layers]
    else:
        masses = [pseudo_sink_logits(of_all, heads, positions, rates) for rates in log_gamma.exp()]
    if listed:
        shifts = shifts_on_device(tuple(map(tuple, settings["shift"])), positions)
        # One addition, not one a layer.
        each = masses[0] if log_gamma is None else torch.stack(masses)
        masses = list(each + shifts[:, None])
    if "layers" not in settings:
        return masses
    none = constant(-torch.inf)
    return [mass if layer in settings["layers"] else none for layer, mass in enumerate(masses)]
