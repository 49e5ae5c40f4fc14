"""The calls made most often, at little more than what their kernels cost.

One row over a short cache takes some tens of microseconds, as a short prompt does, and checking the arguments,
choosing a backend and entering an operator would take as long again. So the plainest calls are known by their
own signs. Whatever else a call may be, wrong arguments included, it goes the general way.

Where ``stablemask build`` has compiled ``native``, it answers them: one row behind a cache, with a kernel of
its own, and a sequence that attends to itself, with gradients or without. Elsewhere there is a short way for
the row alone, through the stock kernel; on CUDA, where launches are what takes the time, with one more for the
sink.
"""

import math

import torch
from torch import Tensor
from torch.nn import Parameter

from .backends import BACKENDS, hardware
from .backends.calls import nothing_watches
from .backends.choice import choose
from .backends.flash import cuda_row
from .call import Call
from .masks import NO_MASKS, Masks
from .native import LIBRARY
from .processor import UNITS
from .pseudo import log_pseudo_mass

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _rows_of(groups: int, dtype: torch.dtype) -> int:
    """How many rows the stock kernel gets for the query heads of a key head, 0 to leave them apart.

    As rows of one key head they read each key once. But with AMX the kernel packs keys of half precision
    for several rows first, which takes longer than reading them twice or three times; and with products of
    bfloat16 alone one row takes the kernel two to three times as long as four, so a lone one is repeated.
    """
    if UNITS.amx:
        half = dtype in (torch.bfloat16, torch.float16)
        return groups if groups >= (4 if half else 2) else 0
    if groups > 1:
        return groups
    return 4 if UNITS.avx512_bf16 and dtype == torch.bfloat16 else 0


def plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    sink_logits: Tensor | float = 0.0,
    gamma: float | Tensor | None = None,
    scale: float | None = None,
    attn_mask: Tensor | None = None,
) -> Tensor | None:
    """Attention of a plain call on the CPU or CUDA; None if it is not one.

    Without gradients that is one row per sequence. Where it is compiled, it is also as many rows as keys,
    then without ``attn_mask`` and with a ``value_dim`` that is ``head_dim``.

    Args:
        query, key, value: as in :func:`~stablemask.sink_attention`, not checked.
        sink_logits: a number, or a tensor of two or three axes that broadcasts to ``(batch, heads, q_len)``;
            else the result is None.
        gamma: StableMask's in place of ``sink_logits``, a number, for the last positions of an infinite
            horizon; else the result is None.
        scale: of the scores, or None.
        attn_mask: which keys a sequence sees, of bool, ``(batch or 1, 1, 1, kv_len)``, where the row is
            compiled or on CUDA; else the result is None.
    """
    if LIBRARY is not None and not torch.compiler.is_compiling():
        out = LIBRARY.attend(query, key, value, sink_logits, gamma, scale, attn_mask)
        if out is not None or not (type(query) is Tensor and query.is_cuda):
            return out
    if not nothing_watches():
        return None
    if not (type(query) is type(key) is type(value) is Tensor):
        return None
    device = hardware.kind_of(query)
    if device not in ("cpu", "cuda") or (attn_mask is not None and device == "cpu"):
        return None
    shape, cache = query.shape, key.shape
    if len(shape) != 4 or shape[2] != 1 or len(cache) != 4 or value.shape != cache:
        return None
    batch, heads, _, head_dim = shape
    _, kv_heads, kv_len, _ = cache
    if cache[0] != batch or cache[3] != head_dim or kv_heads == 0 or heads % kv_heads:
        return None
    if kv_len == 0 or batch == 0 or heads == 0:
        return None
    dtype = query.dtype
    if dtype not in _DTYPES or key.dtype is not dtype or value.dtype is not dtype:
        return None
    if not query.device == key.device == value.device:
        return None
    if not query.stride(3) == key.stride(3) == value.stride(3) == 1:
        return None  # the kernel takes the last axis for contiguous
    if gamma is not None:
        if type(gamma) is not float or not gamma > 0:
            return None
        sink_logits = log_pseudo_mass(kv_len - 1, gamma)
    elif type(sink_logits) is float:
        if math.isnan(sink_logits):
            return None
    elif not (
        isinstance(sink_logits, Tensor)
        and type(sink_logits) in (Tensor, Parameter)
        and _broadcasts(sink_logits.shape, batch, heads)
        and sink_logits.is_floating_point()
        and sink_logits.device == query.device
    ):
        return None
    if scale is None:
        scale = head_dim**-0.5
    elif type(scale) is not float or not math.isfinite(scale):
        return None
    if device == "cuda":
        return _on_cuda(query, key, value, sink_logits, scale, attn_mask)
    out = _unchecked(query, key, value, sink_logits, scale)
    return out.reshape(batch, heads, 1, head_dim)


def _on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor | float,
    scale: float,
    attn_mask: Tensor | None,
) -> Tensor | None:
    kv_len = key.shape[2]
    if torch.is_autocast_enabled("cuda"):
        return None
    if attn_mask is not None and not (
        type(attn_mask) is Tensor
        and attn_mask.dtype == torch.bool
        and attn_mask.device == query.device
        and attn_mask.shape in ((query.shape[0], 1, 1, kv_len), (1, 1, 1, kv_len))
    ):
        return None
    masks = NO_MASKS if attn_mask is None else Masks(attn_mask)
    # What backends do not ask about may be anything.
    sink = sink_logits if isinstance(sink_logits, Tensor) else query
    if choose(Call(query, key, value, sink, masks, 0.0, scale), "auto") is not BACKENDS["flash"]:
        return None
    return cuda_row(query, key, value, sink_logits, attn_mask, scale)


def _unchecked(
    query: Tensor, key: Tensor, value: Tensor, sink_logits: Tensor | float, scale: float
) -> Tensor:
    """The row, with the heads that share keys possibly as rows of one: (B, kv_heads, groups, head_dim)."""
    batch, heads, _, head_dim = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    rows = _rows_of(groups, query.dtype)
    if groups > 1 and rows:
        query = query.reshape(batch, kv_heads, groups, head_dim)
        if isinstance(sink_logits, Tensor) and sink_logits.shape[-2] == heads:
            sink_logits = sink_logits.reshape(-1, kv_heads, groups)
    repeated = groups == 1 and rows > 0
    if repeated:
        query = query.repeat(1, 1, rows, 1)
    out, lse = torch._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, False, attn_mask=None, scale=scale
    )
    if repeated:
        out, lse = out[:, :, :1], lse[:, :, :1]
    return out.mul_(lse.sub_(sink_logits).sigmoid_().unsqueeze(-1))


def _broadcasts(shape: torch.Size, batch: int, heads: int) -> bool:
    """Whether sink logits of this shape are one per sequence and head, or fewer."""
    *outer, inner, last = shape if len(shape) > 1 else (0, 0)
    return last == 1 and inner in (1, heads) and (not outer or outer in ([1], [batch]))
