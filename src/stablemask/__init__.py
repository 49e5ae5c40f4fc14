"""Attention with a pseudo mass, at the speed of the stock kernel.

Read ``pseudo.py`` for the method and ``attention.py`` for the functions; ``stablemask.hf`` brings in
Transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import sink_attention, stable_mask_attention
    from .merging import merge_attention, partial_attention
    from .pseudo import dense_stable_mask, head_decay_rates, mask_ratio, pseudo_logsumexp

__version__ = "0.1.0"

__all__ = [
    "dense_stable_mask",
    "head_decay_rates",
    "mask_ratio",
    "merge_attention",
    "partial_attention",
    "pseudo_logsumexp",
    "sink_attention",
    "stable_mask_attention",
]


def __getattr__(name: str) -> Any:
    # Torch is loaded with the first function that needs it, so that `stablemask --help` is instant.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "pseudo"
    if name.endswith("_attention"):
        module = "merging" if name in ("merge_attention", "partial_attention") else "attention"
    function = getattr(importlib.import_module(f".{module}", __name__), name)
    globals()[name] = function  # found without this function from now on
    return function
