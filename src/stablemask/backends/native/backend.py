"""What ``stablemask build`` compiled for this CPU, as a backend: one row behind a cache, or as many rows as keys.

``native/library.cpp`` holds the kernels, and their operators: the CPU's forward and backward, and autograd's
formula. Here is what they serve, and what shapes they return, which is all that a compiler asks.
"""

import torch
from torch import Tensor

from ...call import Call
from ...masks import NO_MASKS, Masks
from .. import hardware, native
from ..calls import is_exporting, needs_gradient, under_torch_func
from ..stock.flash import fit
from ..stock.operators import lse_dtype


def unsupported(call: Call) -> str | None:
    """Why the compiled library cannot serve this call, or None."""
    query, key, value, _, masks, dropout_p, _, watched = call
    if native.LIBRARY is None:
        return "its library is not there; `stablemask build` compiles it"
    if hardware.kind_of(query) != "cpu":
        return f"it is for the CPU, the tensors are on {query.device.type!r}"
    one_row = query.shape[2] == 1
    if masks is not NO_MASKS:
        if not (one_row and _hides_keys_of_sequences(masks)):
            return "it takes no mask but a bool attn_mask, (batch, 1, 1, kv_len), of one row"
    elif not one_row and query.shape[2] != key.shape[2]:
        return "it takes one row, or as many rows as keys"
    if dropout_p > 0:
        return "it has no dropout"
    if watched:
        if torch.autograd.forward_ad._current_level >= 0:
            return "it has no forward-mode derivative"
        if torch.compiler.is_compiling() and is_exporting():
            return "an exported program may run where it is not compiled"
        if under_torch_func():
            return "it has no rules for torch.func"
    if query.numel() == 0 or value.numel() == 0:
        return "there is nothing to compute"
    return None


def _hides_keys_of_sequences(masks: Masks) -> bool:
    mask = masks.attn_mask
    return (
        mask is not None
        and not masks.by_tile
        and mask.dtype == torch.bool
        and mask.shape[1] == mask.shape[2] == 1
    )


def attend(call: Call) -> Tensor:
    """See the module text; there is no dropout here."""
    query, key, value, _, masks, _, scale, _ = call
    value_dim = value.shape[3]
    if query.shape[2] > 1 or needs_gradient(call):
        query, key, value, value_dim, scale = fit(query, key, value, scale, "cpu")
    forward = torch.ops.stablemask.native_forward.default
    out, _ = forward(query, key, value, call.sinks(), masks.attn_mask, scale)
    return out if out.shape[3] == value_dim else out[..., :value_dim]


# (B, n, H, D) in memory, as kernels return it.
def _fake(like: Tensor, dim: int) -> Tensor:
    batch, heads, length, _ = like.shape
    return like.new_empty(batch, length, heads, dim).transpose(1, 2)


def _fake_forward(query, key, value, sink_logits, attn_mask, scale):
    return (
        _fake(query, value.shape[3]),
        query.new_empty(query.shape[:3], dtype=lse_dtype(query)),
    )


def _fake_backward(
    grad, query, key, value, sink_logits, attn_mask, out, lse, scale, of_sink
):  # fmt: skip
    d_query, d_key, d_value = (_fake(tensor, tensor.shape[3]) for tensor in (query, key, value))
    return d_query, d_key, d_value, sink_logits.new_empty(sink_logits.shape if of_sink else 0)


if native.LIBRARY is not None:
    torch.library.register_fake("stablemask::native_forward", _fake_forward)
    torch.library.register_fake("stablemask::native_backward", _fake_backward)
