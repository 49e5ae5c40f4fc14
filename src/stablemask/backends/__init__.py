"""Ways of computing attention with a sink logit: one file each, one signature.

    attend(query, key, value, sink_logits, masks, dropout_p, scale) -> (batch, heads, q_len, value_dim)

Arguments arrive checked (see ``attention.py``), with sink logits three-dimensional and every mask but
causality in one :class:`~stablemask.masks.Masks`. Each module also says what it cannot do:

    unsupported(query, key, value, sink_logits, masks, dropout_p) -> the reason, or None

``BACKENDS`` is the only list of them, in the order in which ``backend="auto"`` tries them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from . import flash, reference


@dataclass(frozen=True)
class Backend:
    attend: Callable[..., Tensor]
    unsupported: Callable[..., str | None]
    summary: str


BACKENDS: dict[str, Backend] = {
    "flash": Backend(flash.attend, flash.unsupported, "the stock flash kernel of the device"),
    "cudnn": Backend(flash.attend_cudnn, flash.unsupported_cudnn, "the cuDNN kernel, CUDA only"),
    "reference": Backend(
        reference.attend, reference.unsupported, "the dense definition, twice differentiable"
    ),
}
