"""Log of the pseudo mass by position, in tables that are kept: layers ask for it tens of times a token."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import hardware
from ..backends.calls import only_autograd_watches
from .kept import keep
from .settings import complete_settings, pseudo_sink_logits

# Numbers in a table, 16 MiB of them.
_LARGEST_TABLE = 1 << 22


def sink_logits_at(
    given: dict[str, Any], num_heads: int, context: Callable[[], int | None], positions: Tensor
) -> Tensor | None:
    """Log of the mass of each row, float32, broadcastable to (batch, heads, q_len); None if no table has it.

    Args:
        given: settings as :func:`~.settings.complete_settings` takes them, without learned rates and ``layers``.
        context: the model's, asked where the settings leave something to it.
        positions: int, (q_len,) or (batch, q_len).
    """
    table = _table_of(given, num_heads, context, positions)
    if table is None:
        return None
    kind = hardware.kind_of(positions)
    if positions.numel() == 1 and kind == "cpu":  # half the time
        return table[min(max(int(positions), 0), len(table) - 1)]
    kernels = hardware.triton_kernels() if kind == "cuda" else None
    if kernels is not None:
        found = kernels.look_up(table, positions.reshape(-1, positions.shape[-1]))
        return found if positions.dim() == 2 else found[0]
    rows = positions.reshape(-1).clamp(0, len(table) - 1)
    return table.index_select(0, rows).view(*positions.shape, -1).transpose(-1, -2)


def _table_of(
    given: dict[str, Any], num_heads: int, context: Callable[[], int | None], positions: Tensor
) -> Tensor | None:
    """Log of the mass by position, (positions, heads or 1, 1); None where it is worked out each time."""
    if positions.dtype not in (torch.int64, torch.int32) or not only_autograd_watches(positions):
        return None
    try:
        # By value, for settings may change between any two calls.
        settings = tuple(
            [(name, tuple(v) if isinstance(v, list) else v) for name, v in given.items()]
        )
        # The context stands for what is not given, and takes as long to read as all the rest.
        length = None if "gamma" in given and "hold" in given else context()
        key = ("table", settings, num_heads, length)
        return keep(key, positions, lambda: _table(settings, num_heads, length, positions.device))
    except (AttributeError, TypeError):
        return None  # no dict, or no hash: `complete_settings` says what is wrong


def _table(
    settings: tuple[tuple[str, Any], ...], num_heads: int, context: int | None, device: torch.device
) -> Tensor | None:
    """Up to the last position at which it changes; None where it changes for ever, or for too long."""
    complete = complete_settings(dict(settings), num_heads, context)
    last = complete.get("hold")
    if last is None:
        last = complete["horizon"]
    if last is None:
        return None
    length = max(last, complete.get("start", 0)) + 1
    heads = num_heads if isinstance(complete["gamma"], (list, str)) else 1
    if length * heads > _LARGEST_TABLE:
        return None
    positions = torch.arange(length, device=device)
    return pseudo_sink_logits(complete, num_heads, positions).T.contiguous().unsqueeze(-1)
