"""The mask that Transformers makes for our attention: None wherever its arguments say it all.

And what is found out by reading masks and positions: a GPU's host waits for that, where it must, and in
training not at all.
"""

import warnings
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..backends import hardware


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    *,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """As Transformers' ``sdpa_mask``, None or bool (batch, 1, q_length, kv_length).

    None means causal, aligned bottom-right, within the ``sliding_window`` that the layer names. Stock
    SDPA aligns top-left and knows no window, so ``sdpa_mask`` gives a mask for a chunk of a prompt
    behind a cache and for every sliding layer, and none for the prefill of a static cache.
    """
    causal = mask_function is causal_mask_function
    # Chunked attention names a local size too; any other deviation forbids the skip.
    sliding = (
        local_size is not None
        and local_size == getattr(config, "sliding_window", None)
        and getattr(config, "attention_chunk_size", None) is None
    )
    skip = allow_is_causal_skip and q_length == kv_length
    if (
        allow_is_causal_skip  # else the model reads the mask itself
        and (causal or sliding)
        and isinstance(q_offset, int)  # a tensor with a static cache
        and q_offset + q_length == kv_offset + kv_length
    ):
        if not _hides(attention_mask):
            return None
        skip = False  # `sdpa_mask` would read the same once more
    place: Any = q_offset  # `sdpa_mask` says int
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        place,
        kv_offset,
        mask_function,
        attention_mask,
        local_size=local_size,
        allow_is_causal_skip=skip,
        config=config,
        **kwargs,
    )


def _hides(attention_mask: Tensor | None) -> bool:
    """Whether it may hide a token; what makes a graph cannot read its values."""
    if attention_mask is None:
        return False
    return not (can_be_read(attention_mask) and bool(attention_mask.all()))


def can_be_read(tensor: Tensor) -> bool:
    """Whether a pass may look at the values of a tensor: no graph is made of it, compiled or of CUDA."""
    return not (torch.compiler.is_compiling() or hardware.is_capturing(tensor))


# What may have been found, a bool of the device, and what then is to be done.
Finding = tuple[Tensor, Callable[[], None]]
# What the last report of each will do; `bool` does nothing.
_unread: WeakKeyDictionary[nn.Module, Callable[[], object]] = WeakKeyDictionary()


def report(owner: nn.Module, *findings: Finding | None) -> None:
    """Do what follows from what was found.

    In training on CUDA at the next report of the same ``owner``, a layer or a model, so that the host runs
    ahead of the device as it does without; its first report it waits for.
    """
    found = [finding for finding in findings if finding is not None]
    if not found:
        return
    flags = torch.stack([flag for flag, _ in found])
    read = hardware.read_later(flags)

    def act() -> None:
        for is_set, (_, consequence) in zip(read(), found, strict=True):
            if is_set:
                consequence()

    now: Callable[[], object] = act
    if torch.is_grad_enabled() and hardware.kind_of(flags) == "cuda":
        before = _unread.get(owner)
        _unread[owner], now = (act, before) if before else (bool, act)
    now()


def merged_documents(position_ids: Tensor, mask: Tensor | None) -> Finding | None:
    """Positions that restart in a row whose later tokens see the earlier ones all the same: a warning.

    Restarting positions mark packed documents. Transformers keeps those apart only where it is given
    neither a mask of padding nor a cache.

    Args:
        position_ids: (batch or 1, q).
        mask: what attention gets, None (causal) or bool (batch, 1 or heads, q, kv). Others are not read.
    """
    merged = position_ids[:, 1:] < position_ids[:, :-1]
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape[-2] != mask.shape[-1]:
            return None
        real = mask[:, 0].diagonal(dim1=-2, dim2=-1)  # padding does not see itself
        earlier = mask[:, 0].sum(-1) - 1
        merged = merged & (real & (earlier > position_ids))[:, 1:]
    return merged.any(), _warn_of_merged_documents


def _warn_of_merged_documents() -> None:
    warnings.warn(
        "position_ids restart within a row, as in packed documents, and each document sees those "
        "before it: Transformers keeps them apart only without attention_mask and without a cache "
        "(use_cache=False)",
        stacklevel=2,
    )
