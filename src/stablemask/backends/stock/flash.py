"""The stock flash kernels as a backend: which one serves a call, and what none of them can do.

How a stock kernel computes attention with a sink logit is in ``operators.py``.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ...call import Call
from ...masks import NO_MASKS, Masks
from .. import hardware
from ..calls import (
    TINY,
    is_exporting,
    needs_gradient,
    only_autograd_watches,
    under_torch_func,
    with_positive_scale,
)
from . import functional
from .kernels import (
    KERNELS,
    MAX_FLASH_HEAD_DIM,
    as_rows_of_key_heads,
    efficient_row,
    mask_as_bias,
)
from .operators import absorb, eager_forward, flash_forward, scale_rows

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
# Of cuDNN: the first that takes more than 128 columns a head, on Hopper alone.
_CUDNN_WIDE_HEADS = 91000


def unsupported(call: Call) -> str | None:
    """Why no stock kernel can serve this call, or None."""
    query, value = call.query, call.value
    kind = hardware.kind_of(query)
    if kind not in ("cpu", "cuda"):
        return f"no stock flash kernel for device type {query.device.type!r}"
    if call.dropout_p > 0:
        return "the stock flash kernels are called without dropout"
    if call.watched:
        if torch.autograd.forward_ad._current_level >= 0:
            return "the stock flash kernels have no forward-mode derivative"
        if torch.compiler.is_compiling() and under_torch_func():
            return "compiled, the stock flash kernels have no rules for torch.func"
    if call.masks is not NO_MASKS and call.masks.need_gradient:
        return "the stock flash kernels give no gradient for attn_mask or alibi_slopes"
    if kind == "cuda":
        if query.dtype == torch.float64:
            return "no CUDA flash kernel takes float64"
        capability = hardware.capability(query.device)
        if query.dtype == torch.bfloat16 and capability < (8, 0):
            return f"bfloat16 needs compute capability 8.0, this device has {capability}"
        if max(query.shape[-1], value.shape[-1]) > MAX_FLASH_HEAD_DIM:
            return f"head_dim is above {MAX_FLASH_HEAD_DIM}"
    return None


def unsupported_cudnn(call: Call) -> str | None:
    """Why the cuDNN kernel cannot serve this call, or None."""
    query, key, masks = call.query, call.key, call.masks
    if hardware.kind_of(query) != "cuda":
        return f"cuDNN needs a CUDA device, the tensors are on {query.device.type!r}"
    if query.dtype not in _FLASH_DTYPES:
        return f"cuDNN attention takes float16 and bfloat16, not {query.dtype}"
    version, capability = hardware.cudnn_version(), hardware.capability(query.device)
    if version is None:
        return "this PyTorch was built without cuDNN"
    if capability < (8, 0):
        return f"cuDNN attention needs compute capability 8.0, this device has {capability}"
    wide = capability == (9, 0) and version >= _CUDNN_WIDE_HEADS
    limit = MAX_FLASH_HEAD_DIM if wide else 128
    if max(query.shape[-1], call.value.shape[-1]) > limit:
        return f"head_dim is above {limit}, of cuDNN {version} on compute capability {capability}"
    if torch.are_deterministic_algorithms_enabled() and needs_gradient(call):
        return "cuDNN's backward is not deterministic"
    if masks.by_tile or query.shape[2] not in (1, key.shape[2]):
        return "cuDNN is called for squares and single rows, with padding or without"
    if key.shape[2] == 1:
        return "cuDNN attention takes no single key"
    return unsupported(call)


def attend(call: Call) -> Tensor:
    """See the module text; there is no dropout here."""
    return _attend(call, kernel_for(call.query, call.masks))


def attend_cudnn(call: Call) -> Tensor:
    """As ``attend``, through cuDNN."""
    return _attend(call, "cudnn")


def kernel_for(query: Tensor, masks: Masks) -> str:
    """The stock kernel that serves such queries, a key of ``KERNELS``."""
    if hardware.kind_of(query) == "cpu":
        return "cpu"
    takes_half = query.dtype in _FLASH_DTYPES and hardware.capability(query.device) >= (8, 0)
    biased = masks.attn_mask is not None or masks.alibi_slopes is not None
    # Packed, they would be read by the host, which no graph may do.
    unread = masks.documents is not None and torch.compiler.is_compiling()
    return "cuda" if takes_half and not (biased or unread) else "efficient"


def stock_kernel(call: Call) -> str:
    """The kernel that serves a call outside the backends: its parts are for the caller to join.

    Raises:
        ValueError: none does; says why.
    """
    reason = unsupported(call)
    if reason:
        raise ValueError(f"no stock kernel serves this call: {reason}")
    return kernel_for(call.query, call.masks)


def _attend(call: Call, kernel: str) -> Tensor:
    query, key, value, _, masks, _, scale, watched = call
    past = key.shape[2] - query.shape[2]
    one_row = query.shape[2] == 1
    one_call = masks is NO_MASKS and (one_row or past == 0)
    # Not in an exported program: what decomposes the kernel there, ONNX's exporter too, gives no true lse.
    in_sight = watched and torch.compiler.is_compiling() and not is_exporting()
    plain = type(query) is type(key) is type(value) is Tensor and query.numel() > 0
    alone = plain and not watched
    if one_row and alone and not masks.by_tile and kernel in ("cuda", "efficient"):
        row = _cuda_row(call, kernel)
        if row is not None:
            return row
    if one_call and (alone or (in_sight and not needs_gradient(call))):
        # Without an operator around it, which takes as long to enter as a short kernel.
        query, key, value, value_dim, scale = fit(query, key, value, scale, kernel)
        causal = False if one_row else True  # noqa: SIM211 (a bool, where the length is a symbol)
        out, lse = KERNELS[kernel].forward(query, key, value, None, causal, scale)
        narrow = out if out.shape[3] == value_dim else out[..., :value_dim]
        if alone and absorb(out, lse, call.sink_logits) is not None:
            return narrow
        if alone:
            scale_rows(out, lse.sub_(call.sink_logits).sigmoid_())
            return narrow
        # In sight of the compiler, which makes the factor part of what comes next.
        factor = torch.sigmoid(lse - call.sink_logits)
        return (narrow.to(lse.dtype) * factor.unsqueeze(-1)).to(query.dtype)
    return attend_with_lse(query, key, value, call.sinks(), masks, past, scale, kernel)[0]


def _cuda_row(call: Call, kernel: str) -> Tensor | None:
    """A row of decoding on CUDA in one launch more than the kernel's; None where it takes another way."""
    query, key, value, sink_logits, masks, _, scale, _ = call
    attn_mask = masks.attn_mask
    batch, heads, _, head_dim = query.shape
    kv_heads = key.shape[1]
    kernels = hardware.triton_kernels()
    if kernels is None or head_dim % 8 or value.shape[3] != head_dim or scale < TINY:
        return None
    if not query.stride(3) == key.stride(3) == value.stride(3) == 1:
        return None
    if isinstance(sink_logits, Tensor):
        sink_logits = sink_logits.expand(batch, heads, 1)
    if kernel == "cuda":
        out, lse = KERNELS["cuda"].forward(query, key, value, None, False, scale)
        kernels.take_share(out, lse, sink_logits, None, out)
        return out
    bias = top = None
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            bias = mask_as_bias(attn_mask, query.dtype)
        else:
            row, keys = slice(0, 1), slice(0, key.shape[2])
            bias = masks.bias(row, keys, keys.stop - 1, dtype=query.dtype, device=query.device)
        assert bias is not None
        top = as_rows_of_key_heads(bias.amax(-1, keepdim=True).expand(batch, heads, 1, 1), kv_heads)
        top = top.squeeze(-1)
    if isinstance(sink_logits, Tensor):
        sink_logits = sink_logits.unflatten(1, (kv_heads, -1)).squeeze(-1)
    out, lse = efficient_row(query, key, value, bias, scale)
    result = torch.empty(out.shape, dtype=out.dtype, device=out.device)
    kernels.take_share(out, lse, sink_logits, top, result)
    return result.view(batch, heads, 1, head_dim)


def attend_with_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor | None,
    masks: Masks,
    past: int,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Out (B, H, n, V) and lse (B, H, n), as :func:`~.operators.forward` has them, for any value_dim."""
    query, key, value, value_dim, scale = fit(query, key, value, scale, kernel)
    tensors = (query, key, value, sink_logits, masks.attn_mask, masks.alibi_slopes)
    if under_torch_func():
        operator = functional.flash_forward
    elif only_autograd_watches(*tensors, masks.documents):
        operator = eager_forward
    else:
        operator = flash_forward
    out, lse = operator(*tensors, masks.window, masks.documents, past, scale, kernel)
    return (out if out.shape[3] == value_dim else out[..., :value_dim]), lse


def fit(
    query: Tensor, key: Tensor, value: Tensor, scale: float, kernel: str
) -> tuple[Tensor, Tensor, Tensor, int, float]:
    """The tensors as kernels want them, the value_dim to cut the result to, and the scale they then have.

    Kernels want one head_dim, a multiple of 8 on CUDA, a last axis that is contiguous, and a scale above 0.
    Columns of zeros change no score and no value.
    """
    query, scale = with_positive_scale(query, scale)
    head_dim, value_dim = query.shape[3], value.shape[3]
    width = max(head_dim, value_dim)
    width += -width % 8 if kernel != "cpu" else 0
    if width != head_dim:
        query, key = (F.pad(t, (0, width - head_dim)) for t in (query, key))
    if width != value_dim:
        value = F.pad(value, (0, width - value_dim))
    if not query.stride(3) == key.stride(3) == value.stride(3) == 1:
        query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    return query, key, value, value_dim, scale
