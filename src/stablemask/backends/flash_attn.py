"""Attention with a sink logit through the flash-attn package, where it is installed.

The algebra is that of ``operators.py``. The package aligns causality bottom-right, so a cache needs no
second call, and takes windows and (FA2) ALiBi itself.

Written against FA2 2.7.1 to 2.8.3 (``flash_attn.flash_attn_interface``) and FA3 of October 2025
(``flash_attn_interface``), the first of each whose internal functions are custom operators that take
``window_size_left``; and, from its source and not run, against FA4 4.0.0b36 of mid-2026
(``flash_attn.cute.interface``), which has a sink of its own, one a head, and compiles its kernels as they are
called. Tensors there are (B, n, H, D), lse is (B, H, n) in float32.

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
    needs_gradient,
    refuse_second_order,
    say_once,
    sink_gradient,
    under_torch_func,
    with_positive_scale,
)
from .stock.kernels import aligned
from .stock.operators import absorb, lse_dtype, row_sums

MODULES = {
    "fa2": "flash_attn.flash_attn_interface",
    "fa3": "flash_attn_interface",
    "fa4": "flash_attn.cute.interface",
}
# The packages for a major compute capability, the fastest first; FA2 for all others.
_PACKAGES = {9: ("fa3", "fa4", "fa2"), 10: ("fa4", "fa2")}
_DTYPES = (torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256
_FA3_DETERMINISTIC_HEAD_DIM = 192
_FA4_BLACKWELL_HEAD_DIM = 128


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
    if call.watched and (torch.autograd.forward_ad._current_level >= 0 or under_torch_func()):
        return "flash-attn has no forward-mode derivative, and no rules for torch.func"
    return _package_for(call)[1]


def attend(call: Call) -> Tensor:
    """See the module text; there is no dropout here."""
    query, key, value, _, masks, _, scale, _ = call
    package, _ = _package_for(call)
    query, scale = with_positive_scale(query, scale)
    value_dim, width = value.shape[-1], _width(call)
    query, key, value = (_to_package(tensor, width) for tensor in (query, key, value))
    slopes = masks.alibi_slopes if masks.alibi_slopes is None else masks.alibi_slopes.float()
    out, _ = flash_attn_forward(
        query, key, value, call.sinks(), slopes, masks.window, scale, package
    )
    return out[..., :value_dim].transpose(1, 2)


def _to_package(tensor: Tensor, width: int) -> Tensor:
    if tensor.shape[-1] != width:  # padding by nothing makes a copy, of a whole cache too
        tensor = torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]))
    tensor = tensor.transpose(1, 2)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _width(call: Call) -> int:
    """One head_dim, a multiple of 8; columns of zeros change no score and no value."""
    width = max(call.query.shape[-1], call.value.shape[-1])
    return width + -width % 8


def _package_for(call: Call) -> tuple[str, str | None]:
    """The package that serves this call, a key of ``MODULES``, and why it does not."""
    deterministic = torch.are_deterministic_algorithms_enabled() and needs_gradient(call)
    alibi = call.masks.alibi_slopes is not None
    return _package(call.query.device, _width(call), alibi, deterministic)


@constant_while_compiling
def _package(
    device: torch.device, width: int, alibi: bool, deterministic: bool
) -> tuple[str, str | None]:
    return _choose_package(device, width, alibi, deterministic)


@functools.cache
def _choose_package(
    device: torch.device, width: int, alibi: bool, deterministic: bool
) -> tuple[str, str | None]:
    if torch.version.hip is not None:
        return "fa2", "flash-attn is used in its CUDA build, and this is a ROCm device"
    capability = hardware.capability(device)
    if capability < (8, 0):
        return "fa2", f"flash-attn needs compute capability 8.0, this device has {capability}"
    packages = _PACKAGES.get(capability[0], ("fa2",))
    refusals = {}
    for package in packages:
        refusals[package] = problem(package) or _refusal(
            package, capability, width, alibi, deterministic
        )
        if refusals[package] is None:
            return package, None
    # Of the one that is installed, if any is: what the others are not is no help.
    told = next((package for package in packages if problem(package) is None), "fa2")
    return told, refusals[told]


def _refusal(
    package: str, capability: tuple[int, int], width: int, alibi: bool, deterministic: bool
) -> str | None:
    if package != "fa2" and alibi:
        return f"FlashAttention {package[2]} has no alibi_slopes, and FlashAttention 2 is not there"
    if package == "fa3" and deterministic and width > _FA3_DETERMINISTIC_HEAD_DIM:
        return (
            "FlashAttention 3's backward is deterministic up to a head_dim of "
            f"{_FA3_DETERMINISTIC_HEAD_DIM} only"
        )
    if package == "fa4" and capability[0] == 10 and width > _FA4_BLACKWELL_HEAD_DIM:
        return f"FlashAttention 4 takes a head_dim up to {_FA4_BLACKWELL_HEAD_DIM} on {capability}"
    return None


@functools.cache
def is_ahead() -> bool:
    """Whether the package has a kernel that is ahead of the stock ones: FA3 on Hopper, FA4 on Blackwell."""
    if torch.version.hip is not None:
        return False
    packages = _PACKAGES.get(hardware.capability(torch.device("cuda"))[0])
    return packages is not None and problem(packages[0]) is None


def problem(package: str) -> str | None:
    """Why a package, a key of ``MODULES``, cannot be used, or None."""
    try:
        module = _load(package)
    except (ImportError, OSError) as error:  # not there, or built for another PyTorch
        return f"flash-attn cannot be imported ({' '.join(str(error).split())})"
    if package == "fa4":
        backward = getattr(module, "_flash_attn_bwd", None)
        if backward is None or "learnable_sink" not in inspect.signature(backward).parameters:
            return "this flash-attn-4 is too old; it takes one whose sinks have a backward, as 4.0.0b36"
        return None
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
    query, key, value = aligned(query, key, value)
    if package == "fa4":
        return _fa4_forward(query, key, value, sink_logits, window, scale)
    out, lse, *_ = _load(package)._flash_attn_forward(
        query, key, value,
        softmax_scale=scale, causal=True,
        window_size_left=_window_size_left(window, alibi_slopes, key.shape[1]),
        window_size_right=0, softcap=0.0,
        **_only_fa2(package, alibi_slopes, dropout_p=0.0, return_softmax=False),
    )  # fmt: skip
    return _with_sink(out, lse, sink_logits)


def _with_sink(out: Tensor, lse: Tensor, sink_logits: Tensor) -> tuple[Tensor, Tensor]:
    joined = absorb(
        out.transpose(1, 2), lse, sink_logits.to(lse.dtype)
    )  # in one launch, of Triton's
    if joined is not None:
        return out.contiguous(), joined
    joined = torch.logaddexp(lse, sink_logits.to(lse.dtype))
    out = out.mul_(torch.exp(lse - joined).transpose(1, 2).unsqueeze(-1))
    return out.contiguous(), joined


def _fa4_forward(
    query: Tensor, key: Tensor, value: Tensor, sink_logits: Tensor, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    say_once("FlashAttention 4 compiles a kernel for each new kind of call, which takes seconds")
    heads = query.shape[2]
    own_sink = None
    if sink_logits.shape[0] == sink_logits.shape[2] == 1:  # one a head, which the kernel takes in
        own_sink = sink_logits.to(lse_dtype(query)).expand(1, heads, 1).flatten()
    out, lse, *_ = _load("fa4")._flash_attn_fwd(
        query, key, value,
        softmax_scale=scale, causal=True, return_lse=True, learnable_sink=own_sink,
        window_size_left=None if window is None else min(window, key.shape[1]) - 1,
    )  # fmt: skip
    return (out, lse) if own_sink is not None else _with_sink(out, lse, sink_logits)


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
    grad, query, key, value = aligned(grad, query, key, value)
    deterministic = torch.are_deterministic_algorithms_enabled()
    if package == "fa4":
        # Given an lse with the sink in it, as it keeps it itself. Not its gradient of the sink, which is
        # NaN for an infinite one.
        _load(package)._flash_attn_bwd(
            query, key, value, out, grad, lse,
            softmax_scale=scale, causal=True, deterministic=deterministic,
            dq=d_query, dk=d_key, dv=d_value,
            window_size_left=None if window is None else min(window, key.shape[1]) - 1,
        )  # fmt: skip
        return d_query, d_key, d_value
    fa2 = package == "fa2"
    _load(package)._flash_attn_backward(
        dout=grad, q=query, k=key, v=value, out=out, softmax_lse=lse,
        dq=d_query, dk=d_key, dv=d_value,
        softmax_scale=scale, softcap=0.0,
        window_size_left=_window_size_left(window, alibi_slopes, key.shape[1]),
        window_size_right=0,
        deterministic=deterministic,
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
