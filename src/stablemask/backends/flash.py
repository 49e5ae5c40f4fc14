"""Attention with a sink logit through the stock flash kernel of the device, exact, at its speed.

Every flash kernel returns ``lse = log Z``, the logsumexp of a row's visible scores. One more logit
``s`` without a value changes the row by a factor:

    lse' = logaddexp(lse, s)        out = out_kernel * exp(lse - lse')

The kernel's own backward, called with this ``out`` and this ``lse'``, rebuilds ``exp(scores - lse')``
and ``rowsum(grad * out)``; both are what the definition asks for, so its gradients are exact. That of
the sink logit is ``-exp(s - lse') * rowsum(grad * out)``.

The same algebra joins key ranges computed apart, and the sink is just the last of them. So a chunk of
queries behind a cache is two calls, the past (all visible) and the chunk itself (square, causal), and
needs no mask. And so ALiBi, windows and documents, which a kernel takes only as a bias, are done in blocks
of rows, whose bias is made when its turn comes: memory stays linear in length.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..call import Call
from ..masks import Masks
from .kernels import KERNELS

ROWS_IN_BLOCK = 256
_ROWS_IN_BUFFER = 4096

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_MAX_CUDA_HEAD_DIM = 256


def unsupported(call: Call) -> str | None:
    """Why no stock kernel can serve this call, or None."""
    query, value = call.query, call.value
    if query.device.type not in ("cpu", "cuda"):
        return f"no stock flash kernel for device type {query.device.type!r}"
    if call.dropout_p > 0:
        return "the stock flash kernels are called without dropout"
    if call.masks.need_gradient:
        return "the stock flash kernels give no gradient for attn_mask or alibi_slopes"
    if query.device.type == "cuda":
        if query.dtype == torch.float64:
            return "no CUDA flash kernel takes float64"
        if max(query.shape[-1], value.shape[-1]) > _MAX_CUDA_HEAD_DIM:
            return f"head_dim is above {_MAX_CUDA_HEAD_DIM}"
    return None


def unsupported_cudnn(call: Call) -> str | None:
    """Why the cuDNN kernel cannot serve this call, or None."""
    if call.query.device.type != "cuda":
        return f"cuDNN needs a CUDA device, the tensors are on {call.query.device.type!r}"
    if call.query.dtype not in _FLASH_DTYPES:
        return f"cuDNN attention takes float16 and bfloat16, not {call.query.dtype}"
    if not torch.backends.cudnn.is_available():
        return "this PyTorch was built without cuDNN"
    return unsupported(call)


def attend(call: Call) -> Tensor:
    """See the module text; there is no dropout here."""
    query = call.query
    return _attend(call, kernel_for(query.device.type, query.dtype, not call.masks.empty))


def attend_cudnn(call: Call) -> Tensor:
    """As ``attend``, through cuDNN."""
    return _attend(call, "cudnn")


def kernel_for(device: str, dtype: torch.dtype, has_bias: bool) -> str:
    """The stock kernel that serves a device and dtype, a key of ``KERNELS``."""
    if device == "cpu":
        return "cpu"
    return "cuda" if dtype in _FLASH_DTYPES and not has_bias else "efficient"


def _attend(call: Call, kernel: str) -> Tensor:
    query, key, value, sink_logits, masks, _, scale = call
    value_dim = value.shape[-1]
    # Kernels want one head_dim, a multiple of 8 on CUDA; columns of zeros change no score, no value.
    width = max(query.shape[-1], value_dim)
    width += -width % 8 if kernel != "cpu" else 0
    query, key, value = (_widen(tensor, width) for tensor in (query, key, value))
    out, _ = flash_forward(
        query, key, value, sink_logits, masks.attn_mask, masks.alibi_slopes, masks.window,
        masks.documents, scale, kernel,
    )  # fmt: skip
    return out[..., :value_dim]


def _widen(tensor: Tensor, width: int) -> Tensor:
    missing = width - tensor.shape[-1]
    if missing:
        return torch.nn.functional.pad(tensor, (0, missing))
    # The kernels assume that the last axis is contiguous.
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@dataclass(frozen=True)
class _Tile:
    """Query rows and a range of keys that go to the kernel in one call."""

    rows: slice
    keys: slice
    causal: bool
    bias: Tensor | None


def _hidden_score(query: Tensor, kernel: str) -> float:
    """The bias of a score that must not be seen: finite, so that a row with nothing to see is known
    by its lse. Kernels disagree on the lse of such a row when its scores are -inf (the CPU one says
    0).
    """
    return max(torch.finfo(_bias_dtype(query, kernel)).min, -1e30)


def _bias_dtype(query: Tensor, kernel: str) -> torch.dtype:
    # The CPU kernel adds a bias in its own precision, and reads any other as garbage.
    return _lse_dtype(query) if kernel == "cpu" else query.dtype


def _row_blocks(rows: int, masks: Masks) -> list[slice]:
    """All rows at once, or blocks of them where a bias for all would be quadratic."""
    step = ROWS_IN_BLOCK if masks.by_tile else max(rows, 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _tiles(query: Tensor, key: Tensor, rows: slice, masks: Masks, kernel: str) -> Iterator[_Tile]:
    """The calls that make up a block of rows: the keys before it, and its own, causal."""
    past = key.shape[2] - query.shape[2]
    first, stop = past + rows.start, past + rows.stop
    lowest = masks.first_key(first)
    if rows.stop - rows.start == 1:
        ranges = [(slice(lowest, stop), False)]
    else:
        ranges = [(slice(lowest, first), False), (slice(first, stop), True)]
    dtype, hidden = _bias_dtype(query, kernel), _hidden_score(query, kernel)
    for keys, causal in ranges:
        if keys.start < keys.stop:
            bias = masks.bias(
                rows, keys, past,
                hidden=hidden, dtype=_lse_dtype(query), device=query.device,
            )  # fmt: skip
            if bias is not None and bias.dtype != dtype:
                bias = bias.clamp(min=hidden).to(dtype)
            yield _Tile(rows, keys, causal, bias)


def _empty(like: Tensor) -> Tensor:
    """Uninitialised ``(B, H, n, D)`` in the memory order ``(B, n, H, D)``, that of all our results.

    Models read the output in that order; the kernels give it or the order of the query.
    """
    batch, heads, length, dim = like.shape
    return like.new_empty(batch, length, heads, dim).transpose(1, 2)


def _in_order(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


@torch.library.custom_op("stablemask::flash_forward", mutates_args=())
def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    window: int | None,
    documents: Tensor | None,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Causal attention with a sink logit, and the logsumexp of each row with the sink in it.

    Args:
        query: ``(B, H, n, D)``; key, value ``(B, K, m, D)`` with ``n <= m``, last axis contiguous.
        sink_logits: float, broadcastable to ``(B, H, n)``.
        attn_mask, alibi_slopes, window, documents: see :class:`~stablemask.masks.Masks`.
        kernel: a key of ``KERNELS``.

    Returns:
        ``out`` ``(B, H, n, D)`` and ``lse`` ``(B, H, n)``; a row that sees nothing has 0 in both.
    """
    if query.numel() == 0:
        return _empty(query), query.new_empty(query.shape[:3], dtype=_lse_dtype(query))
    masks = Masks(attn_mask, alibi_slopes, window, documents)
    arguments = (query, key, value, sink_logits, masks, scale, kernel)
    blocks = _row_blocks(query.shape[2], masks)
    if len(blocks) == 1:
        out, lse = _attend_block(blocks[0], *arguments)
        return _in_order(out), lse.contiguous()
    out = _empty(query)
    lse = query.new_empty(query.shape[:3], dtype=_lse_dtype(query))
    for rows in blocks:
        out[:, :, rows], lse[:, :, rows] = _attend_block(rows, *arguments)
    return out, lse


def _attend_block(
    rows: slice,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor,
    masks: Masks,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Join the tiles of a block of rows, and the sink as the last part."""
    sink = sink_logits if sink_logits.shape[2] == 1 else sink_logits[..., rows]
    tiles = list(_tiles(query, key, rows, masks, kernel))
    dtype = _lse_dtype(query)
    parts = [
        KERNELS[kernel].forward(
            query[:, :, tile.rows], key[:, :, tile.keys], value[:, :, tile.keys],
            tile.bias, tile.causal, scale,
        )
        for tile in tiles
    ]  # fmt: skip
    lse = parts[0][1] if len(parts) == 1 else torch.logaddexp(parts[0][1], parts[1][1])
    # exp(lse - lse') and lse' = logaddexp(lse, sink), by functions that are vectorised.
    kept = torch.sigmoid(lse - sink.to(dtype))
    weights = [kept] if len(parts) == 1 else [torch.exp(part - lse) * kept for _, part in parts]
    lse = lse - torch.log(kept)
    if any(tile.bias is not None for tile in tiles):
        sees_nothing = lse <= _hidden_score(query, kernel) / 2
        lse = lse.masked_fill(sees_nothing, 0.0)
        weights = [weight.masked_fill(sees_nothing, 0.0) for weight in weights]
    if len(parts) == 1:
        return _scale_rows(parts[0][0], weights[0]), lse
    total = sum(part * weight.unsqueeze(-1) for (part, _), weight in zip(parts, weights))
    assert isinstance(total, Tensor)
    return total.to(query.dtype), lse


def _scale_rows(out: Tensor, weight: Tensor) -> Tensor:
    """``out * weight[..., None]`` in place, the product taken in the precision of ``weight``.

    On the CPU a product of two dtypes makes a converted copy of the whole; a buffer that stays in
    the cache takes half the time.
    """
    if out.device.type != "cpu" or out.dtype == weight.dtype:
        return out.mul_(weight.unsqueeze(-1))
    rows = out  # in the order of memory, which follows that of the query
    if not out.is_contiguous():
        rows, weight = out.transpose(1, 2), weight.transpose(1, 2)
    rows, weight = rows.view(-1, out.shape[-1]), weight.reshape(-1, 1)
    buffer = torch.empty(min(_ROWS_IN_BUFFER, len(rows)), rows.shape[1], dtype=weight.dtype)
    for start in range(0, len(rows), _ROWS_IN_BUFFER):
        chunk = rows[start : start + _ROWS_IN_BUFFER]
        product = buffer[: len(chunk)]
        product.copy_(chunk).mul_(weight[start : start + _ROWS_IN_BUFFER])
        chunk.copy_(product)
    return out


@flash_forward.register_fake
def _(query, key, value, sink_logits, attn_mask, alibi_slopes, window, documents, scale, kernel):
    return _empty(query), query.new_empty(query.shape[:3], dtype=_lse_dtype(query))


@torch.library.custom_op("stablemask::flash_backward", mutates_args=())
def flash_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    window: int | None,
    documents: Tensor | None,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value from the results of ``flash_forward``."""
    if query.numel() == 0:
        return _empty(query), _empty(key).zero_(), _empty(value).zero_()
    grad = grad.contiguous() if grad.stride(-1) != 1 else grad
    masks = Masks(attn_mask, alibi_slopes, window, documents)
    blocks = _row_blocks(query.shape[2], masks)

    def differentiate(tile: _Tile) -> tuple[Tensor, Tensor, Tensor]:
        return KERNELS[kernel].backward(
            grad[:, :, tile.rows], query[:, :, tile.rows],
            key[:, :, tile.keys], value[:, :, tile.keys],
            out[:, :, tile.rows], lse[:, :, tile.rows].contiguous(),
            tile.bias, tile.causal, scale,
        )  # fmt: skip

    if len(blocks) == 1:
        tiles = list(_tiles(query, key, blocks[0], masks, kernel))
        if len(tiles) == 1 and tiles[0].keys.start == 0:
            part_query, part_key, part_value = differentiate(tiles[0])
            return (
                _in_order(part_query),
                _in_order(part_key),
                _in_order(part_value),
            )

    # The gradient of a key is a sum over the blocks, taken in float32 or better.
    precise = query.dtype if len(blocks) == 1 else _lse_dtype(query)
    d_query = _empty(query).zero_()
    d_key, d_value = (_empty(tensor).to(precise).zero_() for tensor in (key, value))
    for rows in blocks:
        for tile in _tiles(query, key, rows, masks, kernel):
            part_query, part_key, part_value = differentiate(tile)
            d_query[:, :, rows] += part_query
            d_key[:, :, tile.keys] += part_key
            d_value[:, :, tile.keys] += part_value
    return d_query, d_key.to(key.dtype), d_value.to(value.dtype)


@flash_backward.register_fake
def _(
    grad, query, key, value, out, lse, attn_mask, alibi_slopes, window, documents, scale, kernel
):  # fmt: skip
    return _empty(query), _empty(key), _empty(value)


def _save_for_backward(ctx, inputs, output):
    query, key, value, sink_logits, attn_mask, slopes, ctx.window, documents, *rest = inputs
    ctx.scale, ctx.kernel = rest
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(query, key, value, sink_logits, attn_mask, slopes, documents, *output)


def _differentiate(ctx, grad, _):
    query, key, value, sink_logits, attn_mask, slopes, documents, out, lse = ctx.saved_tensors
    d_query, d_key, d_value = flash_backward(
        grad, query, key, value, out, lse, attn_mask, slopes, ctx.window, documents,
        ctx.scale, ctx.kernel,
    )  # fmt: skip
    d_sink = None
    if ctx.needs_input_grad[3]:
        # An infinite sink has taken the whole row; its out, and so its gradient, is 0.
        share = torch.exp(sink_logits.to(lse.dtype) - lse).nan_to_num(nan=1.0)
        d_sink = -share * (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        d_sink = d_sink.sum_to_size(sink_logits.shape).to(sink_logits.dtype)
    return d_query, d_key, d_value, d_sink, *(None,) * 6


def _refuse_second_order(ctx, *grads):
    raise RuntimeError(
        "the stock flash kernels cannot be differentiated twice; use backend='reference' for "
        "second-order gradients"
    )


flash_forward.register_autograd(_differentiate, setup_context=_save_for_backward)
flash_backward.register_autograd(_refuse_second_order)
