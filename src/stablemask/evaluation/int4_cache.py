"""A key-value cache in four bits, simulated: what a model loses to outliers among keys and values.

As KIVI has it (Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", 2024, arXiv
2402.02750): a least and a largest number are kept for a group of numbers, which are rounded to 16 even
steps between them. Keys are grouped by channel, over tokens, for the outliers of keys sit in channels;
values by token, over channels. A token is rounded when its group of tokens is full; until then it stays
in full precision. Keys and values are rounded, not packed: it saves no memory.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import InputError

STEPS = 15
GROUP = 32  # tokens of a group of keys, channels of a group of values


def int4_cache(model: PreTrainedModel, *, keep: int = 0) -> DynamicCache:
    """An empty cache of all keys and values, rounded to four bits in groups of 32 tokens.

    Args:
        keep: so many first tokens stay in full precision.

    Raises:
        InputError: ``keep`` is negative, or the model caches something other than keys and values.
    """
    if keep < 0:
        raise InputError(f"keep must be at least 0, got {keep}")
    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    if not {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}:
        raise InputError(f"model_type {config.model_type!r} caches more than keys and values")
    cache.layers = [Int4Layer(keep) for _ in cache.layers]
    return cache


class Int4Layer(DynamicLayer):
    """Rounds each whole group of tokens after the pass that completed it."""

    def __init__(self, keep: int):
        super().__init__()
        self.keep = keep
        self.rounded = 0  # tokens in whole groups, those kept included

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        whole = keys.shape[2] // GROUP * GROUP
        if whole > self.rounded:
            self.keys, self.values = keys.clone(), values.clone()
            for start in range(self.rounded, whole, GROUP):
                tokens = slice(max(start, self.keep), start + GROUP)
                if tokens.start < tokens.stop:
                    self.keys[:, :, tokens] = round_to_int4(keys[:, :, tokens], dim=2)
                    channels = values[:, :, tokens].split(GROUP, dim=3)
                    self.values[:, :, tokens] = torch.cat(
                        [round_to_int4(group, dim=3) for group in channels], dim=3
                    )
            self.rounded = whole
        return keys, values


def round_to_int4(numbers: Tensor, dim: int) -> Tensor:
    """The nearest of 16 numbers evenly spaced from the least to the largest along ``dim``."""
    low, high = numbers.float().aminmax(dim=dim, keepdim=True)
    step = ((high - low) / STEPS).clamp(min=torch.finfo(torch.float32).tiny)
    return (low + ((numbers - low) / step).round() * step).to(numbers.dtype)
