"""Attention with a sink logit through a stock flash kernel, exact, at its speed: two custom operators.

Every flash kernel returns ``lse = log Z``, the logsumexp of a row's visible scores. One more logit
``s`` without a value changes the row by a factor:

    lse' = logaddexp(lse, s)        out = out_kernel * exp(lse - lse')

The kernel's own backward, called with this ``out`` and this ``lse'``, rebuilds ``exp(scores - lse')``
and ``rowsum(grad * out)``; both are what the definition asks for, so its gradients are exact. That of
the sink logit is ``-exp(s - lse') * rowsum(grad * out)``.

The same algebra joins key ranges computed apart, and the sink is just the last of them. So a chunk of
queries behind a cache, or a block of rows under a window, is two calls of the kernel (``tiles.py``), and
memory stays linear in length.

Letters: B batch, H query heads, K key heads, n query rows, m keys, D head_dim.
"""

import functools

import torch
from torch import Tensor

from ...masks import Masks
from .. import hardware
from ..calls import only_autograd_watches, refuse_second_order, sink_gradient
from .kernels import KERNELS, MAX_FLASH_HEAD_DIM
from .tiles import Band, Tile, Tiling

_ROWS_IN_BUFFER = 1024
_NEGLIGIBLE = 40.0


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor | None,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    window: int | None,
    documents: Tensor | None,
    past: int,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """Causal attention with a sink logit, and the logsumexp of each row with the sink in it.

    Args:
        query: (B, H, n, D); key, value (B, K, m, D); last axis contiguous.
        sink_logits: float, three-dimensional, broadcastable to (B, H, n); None for no sink.
        attn_mask, alibi_slopes, window, documents: see :class:`~stablemask.masks.Masks`.
        past: the key at which the first row stands; see :class:`~.tiles.Tiling`.
        kernel: a key of ``KERNELS``.

    Returns:
        ``out`` (B, H, n, D) and ``lse`` (B, H, n), float32 (float64 for float64 inputs). A row that
        sees nothing has 0 in ``out``; its ``lse`` is that of the sink, -inf without one.
    """
    if query.numel() == 0:
        return _empty(query), query.new_empty(query.shape[:3], dtype=lse_dtype(query))
    if sink_logits is not None:
        sink_logits = sink_logits.to(lse_dtype(query))
    masks = Masks(attn_mask, alibi_slopes, window, documents)
    tiling, kernel = _tiling(query, key, masks, past, scale, kernel)
    blocks = tiling.blocks()
    if len(blocks) == 1:
        out, lse = _forward_block(blocks[0], tiling, query, key, value, sink_logits, scale, kernel)
        return _in_order(out), lse.contiguous()
    out, lse = _empty(query), query.new_empty(query.shape[:3], dtype=lse_dtype(query))
    for rows in blocks:
        out[:, :, rows], lse[:, :, rows] = _forward_block(
            rows, tiling, query, key, value, sink_logits, scale, kernel
        )
    return out, lse


def _forward_block(
    rows: slice,
    tiling: Tiling,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor | None,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    parts, biased = [], False
    for tile in tiling.tiles(rows):
        out, lse = KERNELS[kernel].forward(
            query[:, :, tile.rows], key[:, :, tile.keys], value[:, :, tile.keys],
            tile.bias, tile.causal, scale, *_band_of(tile),
        )  # fmt: skip
        parts.append((out, lse if tile.shift is None else lse - tile.shift))
        biased = biased or tile.bias is not None
    sink = sink_logits
    if sink is not None and sink.shape[2] > 1:
        sink = sink[..., rows]
    if not parts:
        out = _empty(query[:, :, rows]).zero_()
        lse = torch.full_like(out[..., 0], -torch.inf, dtype=lse_dtype(query))
        return out, lse if sink is None else lse.copy_(sink)

    if sink is not None and len(parts) == 1 and not biased:
        total = absorb(*parts[0], sink)
        if total is not None:
            return parts[0][0], total
    lse = total = parts[0][1] if len(parts) == 1 else torch.logaddexp(parts[0][1], parts[1][1])
    kept = None
    if sink is not None:
        # exp(lse - total) and total = logaddexp(lse, sink), by functions that are vectorised.
        kept = torch.sigmoid(lse - sink)
        total = lse - torch.log(kept)
    weights: list = [kept]
    if len(parts) == 2:
        weights = [torch.exp(part_lse - lse) for _, part_lse in parts]
        weights = weights if kept is None else [weight * kept for weight in weights]
    if biased:
        nothing = lse == -torch.inf
        total = torch.where(nothing, -torch.inf if sink is None else sink, total)
        ones = torch.ones((), dtype=lse.dtype, device=lse.device)
        weights = [(ones if w is None else w).masked_fill(nothing, 0.0) for w in weights]
    return _weighted_sum([out for out, _ in parts], weights), total


def absorb(out: Tensor, lse: Tensor, sink_logits: Tensor | float) -> Tensor | None:
    """Take the share of a sink out of ``out``, in place, in one pass; its lse with the sink, None if not done."""
    kernels = hardware.triton_kernels() if hardware.kind_of(out) == "cuda" else None
    if kernels is None:
        return None
    if isinstance(sink_logits, Tensor):
        sink_logits = sink_logits.expand(lse.shape)
    kernels.take_share(out, lse, sink_logits, None, out)
    return lse


def _weighted_sum(outs: list[Tensor], weights: list[Tensor | None]) -> Tensor:
    """``sum(out * weight[..., None])`` in the dtype of ``outs``, which it may overwrite."""
    out, weight = outs[0], weights[0]
    if weight is None:
        return out
    if len(outs) == 1:
        return scale_rows(out, weight)
    total = out * weight.unsqueeze(-1)
    for out, weight in zip(outs[1:], weights[1:]):
        assert weight is not None
        total += out * weight.unsqueeze(-1)
    return total.to(out.dtype)


def scale_rows(out: Tensor, weight: Tensor) -> Tensor:
    """``out * weight[..., None]`` in place, the product taken in the precision of ``weight``.

    On the CPU a product of two dtypes makes a converted copy of the whole; a buffer that stays in
    the cache takes half the time, and a tenth of it where the copy's pages are new.
    """
    rows_in_all = weight.numel()
    if (
        rows_in_all <= _ROWS_IN_BUFFER
        or out.dtype == weight.dtype
        or hardware.kind_of(out) != "cpu"
    ):
        return out.mul_(weight.unsqueeze(-1))
    rows = out  # in the order of memory, which follows that of the query
    if not out.is_contiguous():
        rows, weight = out.transpose(1, 2), weight.transpose(1, 2)
    rows, weight = rows.view(-1, out.shape[-1]), weight.reshape(-1, 1)
    buffer = weight.new_empty(_ROWS_IN_BUFFER, rows.shape[1])
    for start in range(0, rows_in_all, _ROWS_IN_BUFFER):
        chunk = rows[start : start + _ROWS_IN_BUFFER]
        product = buffer[: len(chunk)]
        product.copy_(chunk).mul_(weight[start : start + _ROWS_IN_BUFFER])
        chunk.copy_(product)
    return out


def backward(
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
    past: int,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, of their shapes, given those of ``out``.

    ``out`` and ``lse`` are those of :func:`forward`, or of a larger set of keys of which these are a part.
    How the gradients lie in memory is the kernel's choice.
    """
    if query.numel() == 0:
        return _empty(query), _empty(key).zero_(), _empty(value).zero_()
    grad = grad.contiguous() if grad.stride(-1) != 1 else grad
    masks = Masks(attn_mask, alibi_slopes, window, documents)
    if attn_mask is not None or masks.by_tile:
        # A row that sees nothing has scores of -inf only; any finite lse makes their weights 0.
        lse = lse.masked_fill(lse == -torch.inf, 0.0)
    tiling, kernel = _tiling(query, key, masks, past, scale, kernel, backward=True)
    blocks = tiling.blocks()

    def part(tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        tile_lse = lse[:, :, tile.rows]
        tile_lse = tile_lse if tile.shift is None else tile_lse + tile.shift
        return KERNELS[kernel].backward(
            grad[:, :, tile.rows], query[:, :, tile.rows],
            key[:, :, tile.keys], value[:, :, tile.keys],
            out[:, :, tile.rows], tile_lse.contiguous(),
            tile.bias, tile.causal, scale, *_band_of(tile),
        )  # fmt: skip

    if len(blocks) == 1:
        tiles = list(tiling.tiles(blocks[0]))
        if len(tiles) == 1 and tiles[0].keys == slice(0, key.shape[2]):
            return part(tiles[0])

    # The gradient of a key is a sum over the blocks, taken in float32 or better.
    precise = query.dtype if len(blocks) == 1 else lse_dtype(query)
    d_query = _empty(query)
    d_key, d_value = (_empty(tensor).to(precise).zero_() for tensor in (key, value))
    for rows in blocks:
        part_query: Tensor | float = 0.0
        for tile in tiling.tiles(rows):
            of_query, of_key, of_value = part(tile)
            part_query = of_query + part_query
            d_key[:, :, tile.keys] += of_key
            d_value[:, :, tile.keys] += of_value
        d_query[:, :, rows] = part_query
    return d_query, d_key.to(key.dtype), d_value.to(value.dtype)


def lse_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32


def row_sums(grad: Tensor, out: Tensor) -> Tensor:
    """``(grad * out).sum(-1)``, summed in float32 (float64 for float64).

    On CUDA, which converts as it reads and sums, without float32 copies of both: of bfloat16 the products
    are rounded as ``out`` is, and of float16, whose range they could leave, there is one float32 buffer.
    """
    precise = lse_dtype(out)
    if hardware.kind_of(out) == "cuda" and out.dtype == torch.bfloat16:
        return (grad * out).sum(-1, dtype=precise)
    if hardware.kind_of(out) == "cuda" and out.dtype == torch.float16:
        return grad.to(precise).mul_(out).sum(-1)
    return (grad.to(precise) * out.to(precise)).sum(-1)


def _tiling(
    query: Tensor,
    key: Tensor,
    masks: Masks,
    past: int,
    scale: float,
    kernel: str,
    backward: bool = False,
) -> tuple[Tiling, str]:
    """The calls of an attention, and the kernel that takes them."""
    # The widest heads have one column more with lse's gradient.
    if kernel == "cuda" and query.shape[3] > MAX_FLASH_HEAD_DIM:
        kernel = "efficient"
    # The CPU kernel adds a bias in its own precision, and reads any other as garbage.
    dtype = lse_dtype(query) if kernel == "cpu" else query.dtype
    tiling = Tiling(
        masks, query.shape[2], key.shape[2], past, batch=query.shape[0],
        dtype=dtype, device=query.device, on_cpu=hardware.kind_of(query) == "cpu",
        half=kernel == "cpu" and query.dtype in (torch.bfloat16, torch.float16),
        backward=backward, banded=kernel == "cuda",
        alibi_reach=_alibi_reach(query, key, masks, past, scale, kernel),
    )  # fmt: skip
    # FlashAttention takes no bias.
    return tiling, "efficient" if kernel == "cuda" and tiling.biased else kernel


def _band_of(tile: Tile) -> tuple[Band, ...]:
    return () if tile.band is None else (tile.band,)


def _alibi_reach(
    query: Tensor, key: Tensor, masks: Masks, past: int, scale: float, kernel: str
) -> Tensor | None:
    """The ALiBi penalty, (H,), beyond which no key can matter; None where nothing can be said.

    No score is above ``highest = scale |q| |k|``, and no row's lse below ``lowest``, the least score of
    a row with its own key. So a penalty ``p`` leaves a weight under ``exp(highest - lowest - p)``, and one
    of ``exp(-40)``, some 4e-18, is lost in the rounding of float32 sums, of however many of them. Leaving
    such keys out saves the CPU from denormal numbers, with which its backward takes four times as long.
    """
    own_keys = slice(past, past + query.shape[2])
    sees_itself = masks.attn_mask is None and own_keys.stop <= key.shape[2]
    slow = kernel == "cpu" and query.dtype == torch.float32
    if masks.alibi_slopes is None or not (slow and sees_itself):
        return None
    query = query.unflatten(1, (key.shape[1], -1))  # B K groups n D
    own = (query * key[:, :, None, own_keys]).sum(-1) * scale
    longest_query = torch.linalg.vector_norm(query, dim=-1).amax(dim=(0, 3))
    longest_key = torch.linalg.vector_norm(key, dim=-1).amax(dim=(0, 2)).unsqueeze(-1)
    highest = abs(scale) * longest_query * longest_key
    return (_NEGLIGIBLE + highest - own.amin(dim=(0, 3))).flatten()


# Results are (B, n, H, D) in memory whatever the kernel does, as the operators' fake forms promise.
def _empty(tensor: Tensor) -> Tensor:
    batch, heads, length, dim = tensor.shape
    return tensor.new_empty(batch, length, heads, dim).transpose(1, 2)


def _in_order(tensor: Tensor) -> Tensor:
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


# As operators, which compilers, exporters and autograd see whole.
flash_forward = torch.library.custom_op("stablemask::flash_forward", mutates_args=())(forward)


@torch.library.custom_op("stablemask::flash_backward", mutates_args=())
@functools.wraps(backward)
def flash_backward(*inputs):
    d_query, d_key, d_value = backward(*inputs)
    return _in_order(d_query), _in_order(d_key), _in_order(d_value)


@flash_forward.register_fake
def fake_forward(
    query, key, value, sink_logits, attn_mask, slopes, window, documents, past, scale, kernel
):
    return _empty(query), query.new_empty(query.shape[:3], dtype=lse_dtype(query))


@flash_backward.register_fake
def _(
    grad, query, key, value, out, lse, attn_mask, slopes, window, documents, past, scale, kernel
):  # fmt: skip
    return _empty(query), _empty(key), _empty(value)


def save_for_backward(ctx, inputs, output):
    query, key, value, sink_logits, attn_mask, slopes, ctx.window, documents, *rest = inputs
    ctx.past, ctx.scale, ctx.kernel = rest
    ctx.set_materialize_grads(False)  # most calls drop lse
    ctx.save_for_backward(query, key, value, sink_logits, attn_mask, slopes, documents, *output)


def differentiate(ctx, d_out, d_lse, backward=flash_backward):
    """Gradients of every input of ``flash_forward``; either of its outputs may have none."""
    query, key, value, sink_logits, attn_mask, slopes, documents, out, lse = ctx.saved_tensors
    nothing = (None,) * 11
    if d_out is None and d_lse is None:
        return nothing
    d_out = torch.zeros_like(out) if d_out is None else d_out
    masks = (attn_mask, slopes, ctx.window, documents)
    rest = (ctx.past, ctx.scale, ctx.kernel)
    if d_lse is None:
        gradients = backward(d_out, query, key, value, out, lse, *masks, *rest)
    else:
        tensors = (query, key, value, out, lse)
        gradients = _with_lse_gradient(backward, d_out, d_lse, *tensors, *masks, *rest)
    d_sink = None
    if sink_logits is not None and ctx.needs_input_grad[3]:
        d_total = -row_sums(d_out, out)
        d_sink = sink_gradient(sink_logits, lse, d_total if d_lse is None else d_total + d_lse)
    return *gradients, d_sink, *nothing[4:]


def _with_lse_gradient(backward, d_out, d_lse, query, key, value, out, lse, *rest):
    """The backward when lse has a gradient too, which adds ``weight * d_lse`` to that of each score.

    A kernel subtracts ``weight * rowsum(d_out * out)``. One more column, 1 in ``d_out``, ``-d_lse`` in
    ``out`` and 0 in the values, makes that sum the right one.
    """
    dim = query.shape[-1]
    width = -dim % 8 or 8
    column = torch.nn.functional.pad(torch.ones_like(d_lse).unsqueeze(-1), (0, width - 1))
    d_out = torch.cat([d_out, column.to(d_out.dtype)], -1)
    out = torch.cat([out, (column * -d_lse.unsqueeze(-1)).to(out.dtype)], -1)
    query, key, value = (torch.nn.functional.pad(t, (0, width)) for t in (query, key, value))
    gradients = backward(d_out, query, key, value, out, lse, *rest)
    return tuple(gradient[..., :dim] for gradient in gradients)


flash_forward.register_autograd(differentiate, setup_context=save_for_backward)
flash_backward.register_autograd(refuse_second_order)


# Autograd lets no one write into a view that a function returns; what the forward returns is nobody else's.
_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


class _InEager(torch.autograd.Function):
    """The forward and backward above as they are: an operator takes as long to enter as a short kernel."""

    @staticmethod
    def forward(ctx, *inputs):
        with torch._C._ExcludeDispatchKeyGuard(_VIEWS):
            output = forward(*inputs)
        save_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, d_out, d_lse):
        # One that shall be differentiated once more is an operator too, which says why it cannot be.
        alone = only_autograd_watches(d_out, d_lse) and not torch.is_grad_enabled()
        return differentiate(ctx, d_out, d_lse, backward if alone else flash_backward)


eager_forward = _InEager.apply
