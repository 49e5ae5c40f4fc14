"""Ways of computing attention with a sink logit: one file each, one signature.

    attend(call) -> (batch, heads, q_len, value_dim)

A :class:`~stablemask.call.Call` arrives checked (see ``attention.py``). Each module also says what it
cannot do:

    unsupported(call) -> the reason, or None

``BACKENDS`` is the only list of them, in the order in which ``backend="auto"`` tries them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..call import Call
from . import flash, reference


@dataclass(frozen=True)
class Backend:
    attend: Callable[[Call], Tensor]
    unsupported: Callable[[Call], str | None]
    summary: str


BACKENDS: dict[str, Backend] = {
    "flash": Backend(flash.attend, flash.unsupported, "the stock flash kernel of the device"),
    "cudnn": Backend(flash.attend_cudnn, flash.unsupported_cudnn, "the cuDNN kernel, CUDA only"),
    "reference": Backend(
        reference.attend, reference.unsupported, "the dense definition, twice differentiable"
    ),
}
