"""vLLM's ``flash_attn_varlen_func`` on CPU tensors, with the contract of its kernels, as far as they are called here.

Written after ``flash_attn_interface.py`` of vLLM 0.32 and ``flash_api.cpp`` of its flash-attention. Nothing of it
has been held against a card. What a kernel leaves unwritten is NaN.

Letters: T rows, R requests, H query heads, K key heads, D head_dim.
"""

import itertools

import torch
from torch import Tensor


def check(condition, message):
    if not condition:
        raise RuntimeError(f"[contract] {message}")


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: Tensor,
    max_seqlen_k: int,
    seqused_k: Tensor,
    softmax_scale: float,
    causal: bool,
    window_size: list[int],
    alibi_slopes: Tensor | None,
    block_table: Tensor,
    return_softmax_lse: bool,
    out: Tensor,
    scheduler_metadata: Tensor | None,
    num_splits: int,
    fa_version: int,
):
    """q and out (T, H, D); k and v (pages, page, K, D); returns out, and lse (H, T) float32."""
    requests, (rows, heads, dim) = len(cu_seqlens_q) - 1, q.shape
    page, key_heads = k.shape[1:3]
    check(q.dtype in (torch.float16, torch.bfloat16), "FlashAttention only support fp16 and bf16")
    check(k.dtype == v.dtype == out.dtype == q.dtype, "one dtype")
    check(all(x.stride(-1) == 1 for x in (q, k, v, out, block_table)), "contiguous last dimension")
    check(page % 16 == 0, "page block size must be divisible by 16")
    check(k.shape == v.shape == (len(k), page, key_heads, dim), "shape of the cache")
    check(out.shape == q.shape and heads % key_heads == 0, "heads")
    check(seqused_k.shape == (requests,) and len(block_table) == requests, "batch")
    for name, tensor in (("cu", cu_seqlens_q), ("used", seqused_k), ("table", block_table)):
        check(tensor.dtype == torch.int32, f"{name} must be int32")
    check(fa_version in (2, 3, 4), "version")
    check(fa_version == 2 or alibi_slopes is None, "ALiBi is of version 2")
    check(fa_version != 2 or num_splits <= 1, "version 2 does not support num_splits > 1")
    check(fa_version == 3 or scheduler_metadata is None, "a schedule is of version 3")
    starts, lengths = cu_seqlens_q.tolist(), seqused_k.tolist()
    counts = [end - start for start, end in itertools.pairwise(starts)]
    check(max(counts) <= max_seqlen_q and max(lengths) <= max_seqlen_k, "longest rows and keys")
    if window_size[0] >= max_seqlen_k:
        window_size = [-1, window_size[1]]
    windowed = window_size[0] >= 0
    if fa_version == 2 and max_seqlen_q == 1 and alibi_slopes is None:
        causal = False  # one row sees all keys
        if (
            heads > key_heads and not windowed
        ):  # rows by the number of the request, whatever cu_seqlens_q says
            check(rows == requests, "one row a request")
            starts = list(range(requests + 1))
    out.fill_(torch.nan)
    lse = torch.full((heads, rows), torch.nan)
    for request, (start, end, length) in enumerate(zip(starts, starts[1:], lengths)):
        n = end - start
        pages = block_table[request, : -(-length // page)].long()
        keys, values = (x[pages].flatten(0, 1)[:length].float() for x in (k, v))
        keys, values = (x.repeat_interleave(heads // key_heads, 1) for x in (keys, values))
        scores = torch.einsum("ihd,jhd->hij", q[start:end].float(), keys) * softmax_scale
        apart = torch.arange(length - n, length)[:, None] - torch.arange(length)
        if alibi_slopes is not None:
            # By the key, where it knows that all before a row is seen: of each row as much too much.
            distance = apart.abs() if windowed or not causal else -torch.arange(length)
            scores -= alibi_slopes[:, None, None] * distance
        hidden = (apart < 0) & torch.tensor(causal or windowed)
        if windowed:
            hidden = hidden | (apart > window_size[0]) | (apart < -window_size[1])
        scores = scores.masked_fill(hidden, -torch.inf)
        found = scores.logsumexp(-1)
        weights = torch.exp(scores - found.unsqueeze(-1)).nan_to_num(0.0)
        out[start:end] = torch.einsum("hij,jhd->ihd", weights, values).to(out.dtype)
        lse[:, start:end] = found.masked_fill(found == -torch.inf, torch.inf)
    return (out, lse) if return_softmax_lse else out
