"""What every forward pass asks for anew, made once a device.

A copy from the host would wait for a GPU, and end the capture of a CUDA graph.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..backends import hardware
from ..backends.calls import only_autograd_watches
from ..pseudo import head_decay_rates

# Bytes of all that is kept, and those that the smallest counts for: room for 4096 small ones. A model may have
# a table for each of its layers, and with room for one less each would be made anew at every token.
_MOST, _LEAST = 1 << 28, 1 << 16
_KEPT: dict[tuple[Hashable, ...], Any] = {}

Made = TypeVar("Made")


def keep(key: tuple[Hashable, ...], like: Tensor, make: Callable[[], Made]) -> Made | None:
    """What ``make`` gives, made once for a key and the device of a tensor.

    None where it may not be kept: what a tracer or the capture of a graph makes is theirs.
    """
    if not only_autograd_watches(like):
        return None
    key = (*key, like.device)
    try:
        return _KEPT[key]
    except KeyError:
        if hardware.is_capturing(like):
            return None
    with torch.inference_mode(False), torch.no_grad():
        made = make()
    total = _size(made) + sum(map(_size, list(_KEPT.values())))
    for oldest in list(_KEPT):  # other threads keep and drop as well
        if total <= _MOST:
            break
        total -= _size(_KEPT.pop(oldest, None))
    _KEPT[key] = made
    return made


def _size(kept: Any) -> int:
    return max(_LEAST, kept.nbytes if isinstance(kept, Tensor) else 0)


def shifts_on_device(shifts: tuple[Any, ...], like: Tensor) -> Tensor:
    """What is added to log M, where a tensor is, float32 ``(..., heads, 1)``.

    Args:
        shifts: one number per head, or a tuple of them for each layer.
    """

    def make() -> Tensor:
        return torch.tensor(shifts, dtype=torch.float32, device=like.device).unsqueeze(-1)

    kept = keep(("shifts", shifts), like, make)
    return make() if kept is None else kept


def rates_on_device(gamma: str | list[float], num_heads: int, like: Tensor) -> Tensor:
    """A rate of each head, (heads,), where a tensor is: those listed, or for "slopes" ALiBi's.

    On the CPU where the tensor is not on CUDA: Apple's GPU has no float64.
    """

    def make() -> Tensor:
        rates = (
            head_decay_rates(num_heads)
            if isinstance(gamma, str)
            else torch.tensor(gamma, dtype=torch.float64)
        )
        return rates.to(like.device) if hardware.kind_of(like) == "cuda" else rates

    key = ("rates", gamma if isinstance(gamma, str) else tuple(gamma), num_heads)
    kept = keep(key, like, make)
    return make() if kept is None else kept
