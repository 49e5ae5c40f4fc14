"""Log of the pseudo mass by position, in tables that are kept: layers ask for it tens of times a token."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import hardware
from ..backends.calls import only_autograd_watches
from .kept import keep, shifts_on_device
from .settings import of_layer, pseudo_sink_logits, without_shift

# Numbers in the tables of a model, 16 MiB of them.
_LARGEST_TABLES = 1 << 22


def sink_logits_at(
    given: dict[str, Any],
    num_heads: int,
    context: Callable[[], int | None],
    positions: Tensor,
    complete: Callable[[], dict[str, Any]],
    layer: int | None = None,
) -> Tensor | None:
    """Log of the mass of each row, float32, broadcastable to (batch, heads, q_len); None if no table has it.

    Args:
        given: settings as :func:`~.settings.complete_settings` takes them, without learned rates.
        context: the model's, asked where the settings leave something to it.
        positions: int, (q_len,) or (batch, q_len).
        complete: gives the settings checked and with their defaults.
        layer: whose shift is added, where each has its own.
    """
    table = _table_of(given, num_heads, context, positions, complete, layer)
    if table is not None:
        return _look_up(table, positions)
    if not isinstance(given.get("shift"), (list, tuple)):
        return None
    # The tables of all layers may be too large together: one, and each layer's shift.
    table = _table_of(
        without_shift(given), num_heads, context, positions, lambda: without_shift(complete())
    )
    if table is None:
        return None
    return _look_up(table, positions) + shifts_on_device(tuple(given["shift"][layer]), positions)


def _look_up(table: Tensor, positions: Tensor) -> Tensor:
    kind = hardware.kind_of(positions)
    if positions.numel() == 1 and kind == "cpu":  # half the time
        row = min(max(int(positions), 0), len(table) - 1)
        return table[row : row + 1]
    kernels = hardware.triton_kernels() if kind == "cuda" else None
    if kernels is not None:
        found = kernels.look_up(table, positions.reshape(-1, positions.shape[-1]))
        return found if positions.dim() == 2 else found[0]
    rows = positions.reshape(-1).clamp(0, len(table) - 1)
    return table.index_select(0, rows).view(*positions.shape, -1).transpose(-1, -2)


def _table_of(
    given: dict[str, Any],
    num_heads: int,
    context: Callable[[], int | None],
    positions: Tensor,
    complete: Callable[[], dict[str, Any]],
    layer: int | None = None,
) -> Tensor | None:
    """Log of the mass by position, (positions, heads or 1, 1); None where it is worked out each time."""
    if positions.dtype not in (torch.int64, torch.int32) or not only_autograd_watches(positions):
        return None
    try:
        # By value, for settings may change between any two calls; of the shifts, this layer's alone.
        settings = tuple(
            [
                (name, tuple(v[layer] if name == "shift" else v))  # type: ignore[index]
                if isinstance(v, (list, tuple))
                else (name, v)
                for name, v in given.items()
            ]
        )
        # The context stands for what is not given, and takes as long to read as all the rest.
        length = None if "gamma" in given and "hold" in given else context()
        key = ("table", settings, num_heads, length)
        return keep(key, positions, lambda: _table(complete(), num_heads, positions.device, layer))
    except (AttributeError, TypeError, IndexError):
        complete()  # says what is wrong
        raise


def _table(
    settings: dict[str, Any], num_heads: int, device: torch.device, layer: int | None
) -> Tensor | None:
    """Up to the last position at which it changes; None where it changes for ever, or for too long."""
    last = settings.get("hold")
    if last is None and not settings.get("suffix"):
        last = settings["horizon"]
    if last is None:
        return None
    length = max(last, settings.get("start", 0)) + 1
    shift = settings.get("shift")
    by_head = isinstance(shift, list) or isinstance(settings["gamma"], (list, str))
    tables = len(shift) if isinstance(shift, list) else 1
    if length * (num_heads if by_head else 1) * tables > _LARGEST_TABLES:
        return None
    positions = torch.arange(length, device=device)
    logits = pseudo_sink_logits(of_layer(settings, layer), num_heads, positions)
    return logits.T.contiguous().unsqueeze(-1)
