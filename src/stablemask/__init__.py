"""Attention with a pseudo mass, at the speed of the stock kernel.

``import stablemask`` loads torch and nothing else; ``stablemask.hf`` brings in Transformers.
"""

from .attention import sink_attention, stable_mask_attention
from .pseudo import dense_stable_mask, head_decay_rates, mask_ratio, pseudo_logsumexp

__version__ = "0.1.0"

__all__ = [
    "dense_stable_mask",
    "head_decay_rates",
    "mask_ratio",
    "pseudo_logsumexp",
    "sink_attention",
    "stable_mask_attention",
]
