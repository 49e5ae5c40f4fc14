"""Ways of computing attention with a sink logit: one file each, one signature.

    attend(call) -> (batch, heads, q_len, value_dim)

A :class:`~stablemask.call.Call` arrives checked (see ``attention.py``). Each module also says what it
cannot do:

    unsupported(call) -> the reason, or None

``BACKENDS`` is the only list of them; ``choice.py`` chooses among them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..call import Call
from . import blocks, flash_attn, flex, reference
from .native import backend as compiled
from .stock import decomposition, flash


@dataclass(frozen=True)
class Backend:
    attend: Callable[[Call], Tensor]
    unsupported: Callable[[Call], str | None]
    summary: str


BACKENDS: dict[str, Backend] = {
    "native": Backend(
        compiled.attend, compiled.unsupported, "what `stablemask build` compiled, CPU only"
    ),
    "flash": Backend(flash.attend, flash.unsupported, "the stock flash kernel of the device"),
    "cudnn": Backend(flash.attend_cudnn, flash.unsupported_cudnn, "the cuDNN kernel, CUDA only"),
    "flash_attn": Backend(
        flash_attn.attend,
        flash_attn.unsupported,
        "the flash-attn package, FA2, FA3 or FA4, CUDA only",
    ),
    "flex": Backend(flex.attend, flex.unsupported, "FlexAttention; on the CPU forward only"),
    "blocks": Backend(
        blocks.attend, blocks.unsupported, "the definition in blocks of rows, linear memory"
    ),
    "reference": Backend(
        reference.attend, reference.unsupported, "the dense definition, twice differentiable"
    ),
}

decomposition.register()
