"""Attention with a sink logit through the flash-attn package, where it is installed.

The algebra is that of ``operators.py``. The package aligns causality bottom-right, so a cache needs no
second call, and takes windows and (FA2) ALiBi itself.

Written against FA2 2.7.1 to 2.8.3 (``flash_attn.flash_attn_interface``) and FA3 of October 2025
(``flash_attn_interface``), the first of each whose internal functions are custom operators that take
``window_size_left``. Tensors there are (B, n, H, D), lse is (B, H, n) in float32.

Letters: B batch, H query heads, K key heads, n query rows, m keys, D head_dim.
"""

import functools
import importlib
import inspect
from types import ModuleType

import torch
from torch import Tensor

from ..call import Call
from . import hardware
from .calls import (
    constant_while_compiling,
    refuse_second_order,
    sink_gradient,
    with_positive_scale,
)
from .operators import row_sums

MODULES = {"fa3": "flash_attn_interface", "fa2": "flash_attn.flash_attn_interface"}
_DTYPES = (torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256


def unsupported(call: Call) -> str | None:
    """Why the package cannot serve this call, or None."""
    query, masks = call.query, call.masks
    if hardware.kind_of(query) != "cuda":
        return f"flash-attn needs a CUDA device, the tensors are on {query.device.type!r}"
    if query.dtype not in _DTYPES:
        return f"flash-attn takes float16 and bfloat16, not {query.dtype}"
    if max(query.shape[-1], call.value.shape[-1]) > _MAX_HEAD_DIM:
        return f"head_dim is above {_MAX_HEAD_DIM}"
    if call.dropout_p > 0:
        return "flash-attn is called without dropout"
    if masks.attn_mask is not None or masks.documents is not None:
        return "flash-attn takes no attn_mask and no documents"
    if masks.need_gradient:
        return "flash-attn gives no gradient for alibi_slopes"
    return _package(query.device, masks.alibi_slopes is not None)[1]


def attend(call: Call) -> Tensor:
    """See the module text; there is no dropout here."""
    query, key, value, sink_logits, masks, _, scale = call
    package, _ = _package(query.device, masks.alibi_slopes is not None)
    query, scale = with_positive_scale(query, scale)
    value_dim = value.shape[-1]
    # One head_dim, a multiple of 8; columns of zeros change no score and no value.
    width = max(query.shape[-1], value_dim)
    width += -width % 8
    query, key, value = (_to_package(tensor, width) for tensor in (query, key, value))
    slopes = masks.alibi_slopes if masks.alibi_slopes is None else masks.alibi_slopes.float()
    out, _ = flash_attn_forward(
        query, key, value, sink_logits, slopes, masks.window, scale, package
    )
    return out[..., :value_dim].transpose(1, 2)


def _to_package(tensor: Tensor, width: int) -> Tensor:
    tensor = torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]))
    tensor = tensor.transpose(1, 2)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@constant_while_compiling
def _package(device: torch.device, alibi: bool) -> tuple[str, str | None]:
    """The package that serves this device, a key of ``MODULES``, and what is wrong with it."""
    return _choose_package(device, alibi)


@functools.cache
def _choose_package(device: torch.device, alibi: bool) -> tuple[str, str | None]:
    if torch.version.hip is not None:
        return "fa2", "flash-attn is used in its CUDA build, and this is a ROCm device"
    capability = hardware.capability(device)
    if capability[0] == 9 and not alibi and problem("fa3") is None:
        return "fa3", None
    if capability < (8, 0):
        return "fa2", f"flash-attn needs compute capability 8.0, this device has {capability}"
    return "fa2", problem("fa2")


@functools.cache
def is_ahead() -> bool:
    """Whether the package has a kernel that is ahead of the stock one here: FA3, on Hopper."""
    hopper = torch.version.hip is None and hardware.capability(torch.device("cuda"))[0] == 9
    return hopper and problem("fa3") is None


def problem(package: str) -> str | None:
    """Why a package, a key of ``MODULES``, cannot be used, or None."""
    try:
        module = _load(package)
    except (ImportError, OSError) as error:  # not there, or built for another PyTorch
        return f"flash-attn cannot be imported ({' '.join(str(error).split())})"
    # Older ones take a pair; a custom operator hides its parameters.
    if "window_size" in inspect.signature(module._flash_attn_forward).parameters:
        return "this flash-attn is too old; it takes FA2 2.7.1, or FA3 of October 2025, or newer"
    return None


def _load(package: str) -> ModuleType:
    return importlib.import_module(MODULES[package])


def _window_size_left(window: int | None, slopes: Tensor | None, kv_len: int) -> int:
    """How many keys before its own a row sees; -1 is all.

    With ALiBi, all is said as a number. FA2 adds ``slope * key`` rather than ``-slope * distance``
    where it knows that the mask is plain causal: the same weights, but another lse.
    """
    if window is not None:
        return min(window, kv_len) - 1
    return -1 if slopes is None else kv_len - 1


@torch.library.custom_op("stablemask::flash_attn_forward", mutates_args=())
def flash_attn_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor,
    alibi_slopes: Tensor | None,
    window: int | None,
    scale: float,
    package: str,
) -> tuple[Tensor, Tensor]:
    """Causal attention with a sink logit, and the logsumexp of each row with the sink in it.

    Args:
        query: ``(B, n, H, D)``; key, value ``(B, m, K, D)`` with ``n <= m``, last axis contiguous.
        sink_logits: float, broadcastable to ``(B, H, n)``.
        alibi_slopes: ``(H,)`` float32, with FA2 only.
        window: how many of the latest keys, itself included, a row sees.
        package: a key of ``MODULES``.

    Returns:
        ``out`` ``(B, n, H, D)`` and ``lse`` ``(B, H, n)`` float32.
    """
    if query.numel() == 0:
        return _compact(query), _empty_lse(query)
    out, lse, *_ = _load(package)._flash_attn_forward(
        query, key, value,
        softmax_scale=scale, causal=True,
        window_size_left=_window_size_left(window, alibi_slopes, key.shape[1]),
        window_size_right=0, softcap=0.0,
        **_only_fa2(package, alibi_slopes, dropout_p=0.0, return_softmax=False),
    )  # fmt: skip
    joined = torch.logaddexp(lse, sink_logits.to(lse.dtype))
    out = out.mul_(torch.exp(lse - joined).transpose(1, 2).unsqueeze(-1))
    return out.contiguous(), joined


def _only_fa2(package: str, alibi_slopes: Tensor | None, **more) -> dict:
    return {"alibi_slopes": alibi_slopes, **more} if package == "fa2" else {}


def _empty_lse(query: Tensor) -> Tensor:
    batch, n, heads, _ = query.shape
    return query.new_empty((batch, heads, n), dtype=torch.float32)


@flash_attn_forward.register_fake
def _(query, key, value, sink_logits, alibi_slopes, window, scale, package):
    return _compact(query), _empty_lse(query)


@torch.library.custom_op("stablemask::flash_attn_backward", mutates_args=())
def flash_attn_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    alibi_slopes: Tensor | None,
    window: int | None,
    scale: float,
    package: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from the results of ``flash_attn_forward``."""
    d_query, d_key, d_value = (_compact(tensor) for tensor in (query, key, value))
    if query.numel() == 0:
        return d_query, d_key.zero_(), d_value.zero_()
    fa2 = package == "fa2"
    _load(package)._flash_attn_backward(
        dout=grad, q=query, k=key, v=value, out=out, softmax_lse=lse,
        dq=d_query, dk=d_key, dv=d_value,
        softmax_scale=scale, softcap=0.0,
        window_size_left=_window_size_left(window, alibi_slopes, key.shape[1]),
        window_size_right=0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **{"causal" if fa2 else "is_causal": True},
        **_only_fa2(package, alibi_slopes, dropout_p=0.0),
    )  # fmt: skip
    return d_query, d_key, d_value


def _compact(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


@flash_attn_backward.register_fake
def _(grad, query, key, value, out, lse, alibi_slopes, window, scale, package):
    return _compact(query), _compact(key), _compact(value)


def _save_for_backward(ctx, inputs, output):
    query, key, value, sink_logits, slopes, ctx.window, ctx.scale, ctx.package = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, sink_logits, slopes, *output)


def _differentiate(ctx, grad, _):
    query, key, value, sink_logits, slopes, out, lse = ctx.saved_tensors
    gradients = flash_attn_backward(
        grad, query, key, value, out, lse, slopes, ctx.window, ctx.scale, ctx.package
    )
    d_sink = None
    if ctx.needs_input_grad[3]:
        d_total = -row_sums(grad, out).transpose(1, 2)
        d_sink = sink_gradient(sink_logits, lse, d_total)
    return *gradients, d_sink, *(None,) * 4


flash_attn_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
flash_attn_backward.register_autograd(refuse_second_order)
