"""The mask that Transformers makes for our attention: None wherever causality alone says it all."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """As Transformers' ``sdpa_mask``, None or bool (batch, 1, q_length, kv_length).

    Stock SDPA aligns causality top-left, so a chunk of a prompt behind a cache gets a mask from
    ``sdpa_mask``. Ours is aligned bottom-right and needs none.
    """
    if (
        mask_function is causal_mask_function
        and isinstance(q_offset, int)
        and kv_offset == 0
        and q_offset + q_length == kv_length
        and not _hides(attention_mask)
    ):
        return None
    place: Any = q_offset  # a tensor with a static cache, though `sdpa_mask` says int
    return sdpa_mask(
        batch_size, q_length, kv_length, place, kv_offset, mask_function, attention_mask, **kwargs
    )


def _hides(attention_mask: Tensor | None) -> bool:
    """Whether it may hide a token; while compiling its values cannot be read."""
    if attention_mask is None:
        return False
    return torch.compiler.is_compiling() or not bool(attention_mask.all())
