"""Attention with a sink logit through the stock flash kernel of the device, exact, at its speed.

Every flash kernel returns ``lse = log Z``, the logsumexp of a row's visible scores. One more logit
``s`` without a value changes the row by a factor:

    lse' = logaddexp(lse, s)        out = out_kernel * exp(lse - lse')

The kernel's own backward, called with this ``out`` and this ``lse'``, rebuilds ``exp(scores - lse')``
and ``rowsum(grad * out)``; both are what the definition asks for, so its gradients are exact. That of
the sink logit is ``-exp(s - lse') * rowsum(grad * out)``.

The same algebra joins key ranges computed apart, and the sink is just the last of them. So a chunk of
queries behind a cache is two calls, the past (all visible) and the chunk itself (square, causal), and
needs no mask.
"""

import torch
from torch import Tensor

from .kernels import KERNELS

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_MAX_CUDA_HEAD_DIM = 256


def unsupported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor,
    bias: Tensor | None,
    dropout_p: float,
) -> str | None:
    """Why no stock kernel can serve this call, or None."""
    if query.device.type not in ("cpu", "cuda"):
        return f"no stock flash kernel for device type {query.device.type!r}"
    if dropout_p > 0:
        return "the stock flash kernels are called without dropout"
    if bias is not None and bias.requires_grad:
        return "the stock flash kernels give no gradient for attn_mask"
    if query.device.type == "cuda":
        if query.dtype == torch.float64:
            return "no CUDA flash kernel takes float64"
        if max(query.shape[-1], value.shape[-1]) > _MAX_CUDA_HEAD_DIM:
            return f"head_dim is above {_MAX_CUDA_HEAD_DIM}"
    return None


def unsupported_cudnn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor,
    bias: Tensor | None,
    dropout_p: float,
) -> str | None:
    """Why the cuDNN kernel cannot serve this call, or None."""
    if query.device.type != "cuda":
        return f"cuDNN needs a CUDA device, the tensors are on {query.device.type!r}"
    if query.dtype not in _FLASH_DTYPES:
        return f"cuDNN attention takes float16 and bfloat16, not {query.dtype}"
    if not torch.backends.cudnn.is_available():
        return "this PyTorch was built without cuDNN"
    return unsupported(query, key, value, sink_logits, bias, dropout_p)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """See the module text; ``dropout_p`` is 0 here."""
    kernel = kernel_for(query.device.type, query.dtype, bias is not None)
    return _attend(query, key, value, sink_logits, bias, scale, kernel)


def kernel_for(device: str, dtype: torch.dtype, has_bias: bool) -> str:
    """The stock kernel that serves a device and dtype, a key of ``KERNELS``."""
    if device == "cpu":
        return "cpu"
    return "cuda" if dtype in _FLASH_DTYPES and not has_bias else "efficient"


def attend_cudnn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    scale: float,
) -> Tensor:
    """As ``attend``, through cuDNN."""
    return _attend(query, key, value, sink_logits, bias, scale, "cudnn")


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor,
    bias: Tensor | None,
    scale: float,
    kernel: str,
) -> Tensor:
    value_dim = value.shape[-1]
    # Kernels want one head_dim (a multiple of 8 on CUDA); columns of zeros change no score and no value.
    width = max(query.shape[-1], value_dim)
    width += -width % 8 if kernel != "cpu" else 0
    query, key, value = (_widen(tensor, width) for tensor in (query, key, value))
    if bias is not None:
        # The CPU kernel adds a bias in its own precision, and reads any other as garbage.
        bias = _finite_bias(bias, _lse_dtype(query) if kernel == "cpu" else query.dtype)
    out, _ = flash_forward(query, key, value, sink_logits, bias, scale, kernel)
    return out[..., :value_dim]


def _widen(tensor: Tensor, width: int) -> Tensor:
    missing = width - tensor.shape[-1]
    if missing:
        return torch.nn.functional.pad(tensor, (0, missing))
    # The kernels assume that the last axis is contiguous.
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _masked_score(dtype: torch.dtype) -> float:
    """The bias of a hidden score: finite, so that a row with nothing to see is known by its lse.

    Kernels disagree on the lse of such a row when its scores are -inf (the CPU one reports 0).
    """
    return max(torch.finfo(dtype).min, -1e30)


def _finite_bias(bias: Tensor, dtype: torch.dtype) -> Tensor:
    return bias.detach().clamp(min=_masked_score(dtype)).to(dtype)


def _key_ranges(query: Tensor, key: Tensor) -> list[tuple[slice, bool]]:
    """The ranges of keys to call the kernel on, each with whether it is causal."""
    rows, keys = query.shape[2], key.shape[2]
    if rows == 1:
        return [(slice(0, keys), False)]
    past = keys - rows
    square = (slice(past, keys), True)
    return [square] if past == 0 else [(slice(0, past), False), square]


def _columns(bias: Tensor | None, columns: slice) -> Tensor | None:
    return None if bias is None else bias[..., columns]


def _empty(like: Tensor) -> Tensor:
    """Uninitialised ``(B, H, n, D)`` in the memory order of the kernels' outputs, ``(B, n, H, D)``."""
    batch, heads, length, dim = like.shape
    return like.new_empty(batch, length, heads, dim).transpose(1, 2)


def _in_kernel_order(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


@torch.library.custom_op("stablemask::flash_forward", mutates_args=())
def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor,
    bias: Tensor | None,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Causal attention with a sink logit, and the logsumexp of each row with the sink in it.

    Args:
        query: ``(B, H, n, D)``; key, value ``(B, K, m, D)`` with ``n <= m``, last axis contiguous.
        sink_logits: float, broadcastable to ``(B, H, n)``.
        bias: finite, added to the scaled scores, broadcastable to ``(B, H, n, m)`` in all axes but the
            last.
        kernel: a key of ``KERNELS``.

    Returns:
        ``out`` ``(B, H, n, D)`` and ``lse`` ``(B, H, n)``; a row that sees nothing has 0 in both.
    """
    rows = query.shape[:3]
    dtype = _lse_dtype(query)
    if query.numel() == 0 or key.shape[2] == 0:
        return _empty(query).zero_(), query.new_zeros(rows, dtype=dtype)

    parts = [
        KERNELS[kernel].forward(
            query, key[:, :, keys], value[:, :, keys], _columns(bias, keys), causal, scale
        )
        for keys, causal in _key_ranges(query, key)
    ]
    lse = parts[0][1] if len(parts) == 1 else torch.logaddexp(parts[0][1], parts[1][1])
    # exp(lse - lse') and lse' = logaddexp(lse, sink), by functions that are vectorised.
    kept = torch.sigmoid(lse - sink_logits.to(dtype))
    weights = [kept] if len(parts) == 1 else [torch.exp(part - lse) * kept for _, part in parts]
    lse = lse - torch.log(kept)
    if bias is not None:
        sees_nothing = lse <= _masked_score(bias.dtype) / 2
        lse = lse.masked_fill(sees_nothing, 0.0)
        weights = [weight.masked_fill(sees_nothing, 0.0) for weight in weights]

    if len(parts) == 1:
        out = _in_kernel_order(parts[0][0].mul_(weights[0].unsqueeze(-1)))
    else:
        total = torch.stack(
            [part * weight.unsqueeze(-1) for (part, _), weight in zip(parts, weights)]
        ).sum(0)
        out = _in_kernel_order(total.to(query.dtype))
    return out, lse.contiguous()


@flash_forward.register_fake
def _(query, key, value, sink_logits, bias, scale, kernel):
    return _empty(query), query.new_empty(query.shape[:3], dtype=_lse_dtype(query))


@torch.library.custom_op("stablemask::flash_backward", mutates_args=())
def flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from the results of ``flash_forward``."""
    d_query, d_key, d_value = _empty(query), _empty(key), _empty(value)
    if query.numel() == 0 or key.shape[2] == 0:
        return d_query.zero_(), d_key.zero_(), d_value.zero_()

    grad = grad.contiguous() if grad.stride(-1) != 1 else grad
    ranges = _key_ranges(query, key)
    for index, (keys, causal) in enumerate(ranges):
        part_query, part_key, part_value = KERNELS[kernel].backward(
            grad, query, key[:, :, keys], value[:, :, keys], out, lse,
            _columns(bias, keys), causal, scale,
        )  # fmt: skip
        if len(ranges) == 1:
            return (
                _in_kernel_order(part_query),
                _in_kernel_order(part_key),
                _in_kernel_order(part_value),
            )
        d_query = d_query.copy_(part_query) if index == 0 else d_query.add_(part_query)
        d_key[:, :, keys], d_value[:, :, keys] = part_key, part_value
    return d_query, d_key, d_value


@flash_backward.register_fake
def _(grad, query, key, value, out, lse, bias, scale, kernel):
    return _empty(query), _empty(key), _empty(value)


def _save_for_backward(ctx, inputs, output):
    query, key, value, sink_logits, bias, ctx.scale, ctx.kernel = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, sink_logits, bias, *output)


def _differentiate(ctx, grad, _):
    query, key, value, sink_logits, bias, out, lse = ctx.saved_tensors
    d_query, d_key, d_value = flash_backward(
        grad, query, key, value, out, lse, bias, ctx.scale, ctx.kernel
    )
    d_sink = None
    if ctx.needs_input_grad[3]:
        # An infinite sink has taken the whole row; its out, and so its gradient, is 0.
        share = torch.exp(sink_logits.to(lse.dtype) - lse).nan_to_num(nan=1.0)
        d_sink = -share * (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        d_sink = d_sink.sum_to_size(sink_logits.shape).to(sink_logits.dtype)
    return d_query, d_key, d_value, d_sink, None, None, None


def _refuse_second_order(ctx, *grads):
    raise RuntimeError(
        "the stock flash kernels cannot be differentiated twice; use backend='reference' for "
        "second-order gradients"
    )


flash_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
flash_backward.register_autograd(_refuse_second_order)
