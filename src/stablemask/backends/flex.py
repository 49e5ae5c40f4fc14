"""Attention with a sink logit through FlexAttention, which makes a kernel for the masks of a call.

On CUDA the kernel returns the logsumexp of each row, differentiable, and the sink is a factor on its
output, as in ``operators.py``, in plain differentiable PyTorch. On the CPU FlexAttention returns no
logsumexp and has no backward: there the sink is one more key, whose score is the sink logit and whose
value is 0.

Letters: B batch, H query heads, n query rows, m keys.
"""

import functools
import os
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention
from torch.nn.functional import pad

from ..call import Call
from ..masks import Masks, additive
from . import hardware, reference
from .calls import constant_while_compiling, is_exporting, needs_gradient, say_once

_BLOCK = 128  # rows and keys of a block of the block mask
_MIN_CUDA_HEAD_DIM = 16
_MAX_HEAD_DIM = 256

# What a kernel reads of a call's lengths, by its place in a tensor.
_PAST, _WINDOW, _LAST_ROW, _LAST_KEY = range(4)

Blocks = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # as in BlockMask


def unsupported(call: Call) -> str | None:
    """Why FlexAttention cannot serve this call, or None."""
    query = call.query
    device = hardware.kind_of(query)
    if device not in ("cpu", "cuda"):
        return f"FlexAttention is used on CPU and CUDA, not on {device!r}"
    if query.dtype == torch.float64:
        return "FlexAttention does not take float64"
    if call.dropout_p > 0:
        return "FlexAttention has no dropout"
    if max(query.shape[-1], call.value.shape[-1]) > _MAX_HEAD_DIM:
        return f"head_dim is above {_MAX_HEAD_DIM}"
    if device == "cpu":
        if needs_gradient(call):
            return "FlexAttention has no backward on the CPU; call it under torch.no_grad()"
        if torch.compiler.is_compiling():
            # Its lowering reads only tensors that come from outside the graph (PyTorch 2.13).
            return "FlexAttention on the CPU cannot be part of a larger compiled function"
        return cpu_problem()
    return _cuda_problem(call)


def _cuda_problem(call: Call) -> str | None:
    problem = hardware.compiler_problem()
    if problem is not None:
        return f"FlexAttention on CUDA needs a compiler: {problem}"
    query, key, value = call.query, call.key, call.value
    if query.dtype == torch.float32:
        width = max(query.shape[-1], value.shape[-1])
        needed, there = _shared_memory(width), hardware.shared_memory(query.device)
        if needed > there:
            return (
                f"FlexAttention in float32 at a head_dim of {width} needs {needed} bytes of shared "
                f"memory, this device has {there}"
            )
    if is_exporting() and not type(query.shape[2]) is type(key.shape[2]) is int:
        return "FlexAttention cannot be exported with a dynamic length, only with a fixed one"
    return None


def _shared_memory(head_dim: int) -> int:
    """Bytes of shared memory of the float32 forward on CUDA, with the blocks that PyTorch chooses.

    A block of rows, two buffers each of a block of keys and of values, and the weights.
    """
    rows, keys = {64: (128, 32), 128: (128, 32), 256: (64, 16)}.get(head_dim, (64, 64))
    width = 1 << (head_dim - 1).bit_length()
    return 4 * (rows * width + 4 * keys * width + rows * keys)


@constant_while_compiling
def cpu_problem() -> str | None:
    """What this machine lacks to run FlexAttention on its CPU, or None."""
    return _look_for_compiler()


@functools.cache
def _look_for_compiler() -> str | None:
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        return f"FlexAttention on the CPU needs a C++ compiler, and there is no {compiler!r}"
    if sys.platform == "darwin" or torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX"):
        return "FlexAttention on the CPU needs AVX2"
    return None


def attend(call: Call) -> Tensor:
    """See the module text; there is no dropout here."""
    by_key = not _returns_lse(call.query)
    if by_key:
        call = call._replace(masks=_without_float64(call.masks))
    query, key, value, _, masks, _, scale, _ = call
    batch, _, n, head_dim = query.shape
    m, value_dim = value.shape[2:]
    if n == 0 or batch == 0:
        return reference.attend(call)
    sink = call.sinks().float()
    documents = masks.documents
    if documents is not None:
        documents = documents.expand(batch, m).contiguous()
    if by_key:
        # It refuses a leaf that wants a gradient even where none is asked for.
        query = query.detach()
        key, value = (pad(tensor.detach(), (0, 0, 0, 1)) for tensor in (key, value))
        sink = sink.expand(query.shape[:3]).contiguous()
    else:
        query, key = (_at_least(tensor, _MIN_CUDA_HEAD_DIM) for tensor in (query, key))
        value = _at_least(value, _MIN_CUDA_HEAD_DIM)

    arguments = (
        query, key, value, sink if by_key else None, masks.attn_mask, masks.alibi_slopes, documents,
        _numbers(n, m, masks.window, query.device), _block_tensors(call), scale,
    )  # fmt: skip
    if torch.compiler.is_compiling():  # the compiler outside makes the kernel
        out, lse = _flex(*arguments)
    else:
        out, lse = _compiled(_structure(call))(*arguments)
    if lse is None:
        # An infinite sink takes its whole row, of which the kernel makes inf - inf.
        out = out.masked_fill((sink == torch.inf).unsqueeze(-1), 0.0)
    else:
        # A row that sees nothing has lse -inf and gives its sink everything.
        share = torch.sigmoid((lse - sink).masked_fill(lse == -torch.inf, -torch.inf))
        out = (out * share.unsqueeze(-1)).to(query.dtype)
    return out[..., :value_dim]


def _without_float64(masks: Masks) -> Masks:
    """With float64 among its scores, which are float32, what the compiler makes for a CPU gives NaN."""
    mask, slopes = masks.attn_mask, masks.alibi_slopes
    if mask is not None and mask.dtype == torch.float64:
        masks = replace(masks, attn_mask=additive(mask, torch.float32))
    if slopes is not None and slopes.dtype == torch.float64:
        masks = replace(masks, alibi_slopes=slopes.float())
    return masks


def _returns_lse(query: Tensor) -> bool:
    return hardware.kind_of(query) != "cpu"


def _at_least(tensor: Tensor, dim: int) -> Tensor:
    return pad(tensor, (0, max(0, dim - tensor.shape[-1])))


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink: Tensor | None,
    attn_mask: Tensor | None,
    slopes: Tensor | None,
    documents: Tensor | None,
    numbers: Tensor,
    blocks: Blocks,
    scale: float,
) -> tuple[Tensor, Tensor | None]:
    """One kernel call: ``out`` and ``lse``; with ``sink``, its key is the last and lse is None."""
    # Kernels capture tensors and not integers, so that no length is part of one.
    is_bool = attn_mask is not None and attn_mask.dtype == torch.bool

    # A kernel looks at whole blocks; these keep it inside the tensors.
    def inside_rows(row):
        return torch.minimum(row, numbers[_LAST_ROW])

    def inside_keys(key):
        return torch.minimum(key, numbers[_LAST_KEY])

    def mask_at(batch, head, row, key):
        assert attn_mask is not None
        index = (batch, head, inside_rows(row))
        index = tuple(at for at, size in zip(index, attn_mask.shape) if size != 1)
        return attn_mask.squeeze((0, 1, 2))[(*index, inside_keys(key))]

    def mask_mod(batch, head, row, key):
        distance = numbers[_PAST] + row - key
        visible = (distance >= 0) & (distance < numbers[_WINDOW])
        if documents is not None:
            own = documents[batch, numbers[_PAST] + inside_rows(row)]
            visible = visible & (own == documents[batch, inside_keys(key)])
        if is_bool:
            visible = visible & mask_at(batch, head, row, key)
        return visible if sink is None else visible | (key > numbers[_LAST_KEY])

    def score_mod(score, batch, head, row, key):
        if slopes is not None:
            score = score - slopes[head] * (numbers[_PAST] + row - key)
        if attn_mask is not None and not is_bool:
            score = score + mask_at(batch, head, row, key)
        if sink is not None:
            of_sink = sink[batch, head, inside_rows(row)]
            score = torch.where(key > numbers[_LAST_KEY], of_sink, score)
        return score

    attend = functools.partial(
        flex_attention, query, key, value, score_mod=score_mod, scale=scale,
        block_mask=BlockMask(
            (query.shape[2], key.shape[2]), *blocks, (_BLOCK, _BLOCK), mask_mod
        ),
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    if sink is not None:
        return attend(), None
    out, aux = attend(return_aux=AuxRequest(lse=True))
    return out, aux.lse


def _structure(call: Call) -> tuple:
    """What a compiled kernel is made for: the lengths, last, or what the compiler makes of them where they are None."""
    query, key, value, _, masks, _, scale, _ = call
    n, m = query.shape[2], key.shape[2]
    mask = masks.attn_mask
    # Of lengths that masks have too, what is made for a CPU (by PyTorch 2.13) takes one for another by its name: it
    # does not compile, or reads what is not there.
    fixed = not _returns_lse(query) and not (mask is None and masks.documents is None)
    return (
        query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3], value.shape[3],
        query.shape[0] == 1, n == 1, n <= _BLOCK, m <= _BLOCK, n == m, scale,
        masks.alibi_slopes is not None, masks.documents is not None,
        None if mask is None else (mask.dtype, *(size == 1 for size in mask.shape)),
        needs_gradient(call), (query.shape[0], n, m) if fixed else None,
    )  # fmt: skip


@functools.cache
def _compiled(structure: tuple) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """``_flex`` compiled for any length, or for those of its structure.

    The compiler gives up on code that it has compiled eight times; so each structure has its own.
    """
    say_once("FlexAttention compiles a kernel for each new kind of call, which takes seconds")
    code = _flex.__code__.replace(co_name=f"_flex_{abs(hash(structure)):x}")
    own = types.FunctionType(code, _flex.__globals__)
    return torch.compile(own, dynamic=structure[-1] is None, fullgraph=True)


def _numbers(n: int, m: int, window: int | None, device: torch.device) -> Tensor:
    """Keys before the first row, window, last row and last key, for the kernel to read."""
    values = (m - n, m if window is None else window, n - 1, m - 1)
    if torch.compiler.is_compiling():  # lengths may be symbols
        return torch.stack([torch.full((), value, device=device) for value in values])
    return _remember_numbers(values, device)


@functools.lru_cache(maxsize=256)
def _remember_numbers(values: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)


def _block_tensors(call: Call) -> Blocks:
    """Which blocks of keys a block of rows looks at, in part or in full, as BlockMask wants them."""
    masks, device = call.masks, call.query.device
    n, m = call.query.shape[2], call.key.shape[2]
    has_sink_key = not _returns_lse(call.query)
    is_bool = masks.attn_mask is not None and masks.attn_mask.dtype == torch.bool
    arguments = (n, m, masks.window, is_bool, has_sink_key, device)
    if masks.documents is not None or torch.compiler.is_compiling():
        return _make_blocks(*arguments, masks.documents)
    return _remember_blocks(*arguments)


@functools.lru_cache(maxsize=64)
def _remember_blocks(
    n: int, m: int, window: int | None, is_bool: bool, has_sink_key: bool, device: torch.device
) -> Blocks:
    with torch.inference_mode(False):  # a later call may train
        return _make_blocks(n, m, window, is_bool, has_sink_key, device, None)


def _make_blocks(
    n: int,
    m: int,
    window: int | None,
    is_bool: bool,
    has_sink_key: bool,
    device: torch.device,
    documents: Tensor | None,
) -> Blocks:
    """From the bounds of each block: no tensor of ``n`` times ``m``."""
    past = m - n
    row = torch.arange(0, n, _BLOCK, device=device).unsqueeze(-1)
    key = torch.arange(0, m + 1 if has_sink_key else m, _BLOCK, device=device)
    first, last = past + row, past + (row + _BLOCK).clamp(max=n) - 1
    key_last = key + _BLOCK - 1
    some = key <= last
    every = (key_last <= first) & (row + _BLOCK <= n) & (not is_bool)
    if window is not None:
        some = some & (first - key_last < window)
        every = every & (last - key < window)
    some, every = some[None, None], every[None, None]
    if documents is not None:
        low, high = _bounds(documents, len(key))
        own_low, own_high = _bounds(documents[:, past:], len(row))
        low, high = low[:, None, None], high[:, None, None]
        own_low, own_high = own_low[:, None, :, None], own_high[:, None, :, None]
        some = some & (low <= own_high) & (own_low <= high)
        every = every & (low == own_high) & (own_low == high)
    if has_sink_key:
        some = some | (key_last >= m)
    some = some & ~every
    mask = BlockMask.from_kv_blocks(*_in_order(some), *_in_order(every), BLOCK_SIZE=_BLOCK)
    return cast(Blocks, mask.as_tuple()[2:10])


def _bounds(ids: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest document of each block of keys, (B, num_blocks)."""
    missing = num_blocks * _BLOCK - ids.shape[1]
    if missing > 0:
        ids = torch.cat([ids, ids[:, -1:].expand(-1, missing)], dim=1)
    low, high = ids.unflatten(1, (num_blocks, _BLOCK)).aminmax(dim=-1)
    return low, high


def _in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of a row are set, and their indices before those of the others."""
    order = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int().contiguous()
