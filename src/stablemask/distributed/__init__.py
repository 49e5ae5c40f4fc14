"""Attention whose tensors lie on several processes.

    tensor_parallel.py   heads or batch sharded: DTensors, and models with some of the heads per rank
    context_parallel.py  the sequence sharded: keys and values travel around a ring

``stable_mask_attention`` and ``sink_attention`` take DTensors themselves; the names exported here are
those of context parallelism. Nothing of ``torch.distributed`` is loaded before one is used.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .context_parallel import (
        context_parallel_attention,
        context_parallel_stable_mask_attention,
        sequence_positions,
        shard_sequence,
        unshard_sequence,
    )

__all__ = [
    "context_parallel_attention",
    "context_parallel_stable_mask_attention",
    "sequence_positions",
    "shard_sequence",
    "unshard_sequence",
]


def is_dtensor(tensor: object) -> bool:
    """Whether it is a DTensor; who never made one does not load their module to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(".context_parallel", __name__), name)
