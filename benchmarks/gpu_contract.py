"""The kernels on a card against float64: what the emulation of tests/cuda_contract.py says of them, asked of one.

Forward, logsumexp, and the backward from the output and logsumexp of rows that have a sink logit beside their
keys, which is what all of StableMask rests on.

Letters: B batch, H heads, n query rows, m keys, D head_dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from stablemask.backends.stock.kernels import KERNELS
from stablemask.backends.stock.tiles import Band

BATCH, HEADS, HEAD_DIM = 2, 4, 64
SINK, SCALE = 0.5, 0.125
WINDOW, DOCUMENT = 20, 50
# "rows" is (B, n, H, D) in memory, as projections make it; "heads" is (B, H, n, D).
LAYOUTS = ("rows", "heads")


@dataclass(frozen=True)
class Check:
    """One call of a kernel and its backward.

    Attributes:
        band: "window", "documents" or "chunk" (rows behind a cache), which FlashAttention takes by itself.
        layout, out_layout: of the inputs and the gradient, and of the output that the backward is given.
        after_stock: stock attention has had a backward of the same shapes and layouts before, so that a kernel
            that caches its graphs finds one.
    """

    kernel: str
    rows: int
    keys: int
    dtype: str
    causal: bool = False
    bias: bool = False
    kv_heads: int = HEADS
    band: str | None = None
    layout: str = "rows"
    out_layout: str = "rows"
    after_stock: bool = False

    @property
    def name(self) -> str:
        parts = [self.kernel, self.dtype, f"{self.rows} x {self.keys}"]
        parts += ["causal"] * self.causal + ["bias"] * self.bias + [self.band or ""]
        parts += [f"{self.kv_heads} key heads"] * (self.kv_heads < HEADS)
        if (self.layout, self.out_layout) != ("rows", "rows"):
            parts.append(f"{self.layout} in, {self.out_layout} out")
        parts += ["after stock"] * self.after_stock
        return ", ".join(part for part in parts if part)


def checks(capability: tuple[int, int]) -> Iterator[Check]:
    """All that a card of this capability is said to serve, the believed faults of some kernel first."""
    half = ("bfloat16", "float16") if capability >= (8, 0) else ("float16",)
    kernels = {"efficient": (*half, "float32")}
    if capability >= (8, 0):
        kernels = {"cuda": half, "cudnn": half, **kernels}
    for kernel, dtypes in kernels.items():
        for dtype, layout, out_layout in product(dtypes, LAYOUTS, LAYOUTS):
            yield Check(kernel, 64, 64, dtype, True, layout=layout, out_layout=out_layout)
    if "cudnn" in kernels:
        for layout, out_layout in product(LAYOUTS, LAYOUTS):
            given: dict[str, Any] = {
                "layout": layout,
                "out_layout": out_layout,
                "after_stock": True,
            }
            yield Check("cudnn", 72, 72, "bfloat16", True, **given)
    sizes = ((129, 129, True), (40, 217, False), (1, 63, False), (1, 1, False))
    for kernel, dtypes in kernels.items():
        biases = (False,) if kernel == "cuda" else (False, True)
        for dtype, (n, m, causal), bias, kv_heads in product(dtypes, sizes, biases, (HEADS, 1)):
            if kernel != "cudnn" or m > 1:  # stock attention gives cuDNN no single key, nor do we
                yield Check(kernel, n, m, dtype, causal, bias, kv_heads)
    if "cuda" in kernels:
        bands = (("window", 130, 130), ("documents", 130, 130), ("chunk", 8, 130))
        for dtype, (band, n, m), kv_heads in product(half, bands, (HEADS, 1)):
            yield Check("cuda", n, m, dtype, kv_heads=kv_heads, band=band)


def error_of(check: Check, device: str) -> float:
    """The largest distance from float64 as a share of what is allowed: right is at most 1, and no NaN.

    Allowed are twice the distance of the dense definition evaluated in the dtype, and four roundings of the
    largest term; of the logsumexp, which enters an exponential, a quarter of a rounding.
    """
    torch.manual_seed(0)
    dtype = getattr(torch, check.dtype)
    heads = (HEADS, check.kv_heads, check.kv_heads, HEADS)
    lengths = (check.rows, check.keys, check.keys, check.rows)
    query, key, value, grad = (
        _laid(torch.randn(BATCH, h, length, HEAD_DIM, device=device, dtype=dtype), check.layout)
        for h, length in zip(heads, lengths)
    )
    if check.after_stock:
        _stock_backward(query, key, value, grad)
    bias = None
    if check.bias:
        bias = torch.zeros(BATCH, 1, 1, check.keys, device=device, dtype=dtype)
        bias[0, ..., : check.keys // 3] = -1e4
    kernel, band = KERNELS[check.kernel], _band(check, device)
    extra = () if band is None else (band,)
    out, lse = kernel.forward(query, key, value, bias, check.causal, SCALE, *extra)
    joined = torch.logaddexp(lse, torch.full_like(lse, SINK))
    out = _laid((out.float() * torch.exp(lse - joined).unsqueeze(-1)).to(dtype), check.out_layout)
    found = kernel.backward(
        grad, query, key, value, out, joined.contiguous(), bias, check.causal, SCALE, *extra
    )
    exact = _definition(check, query, key, value, grad, bias, torch.float64)
    dense = _definition(check, query, key, value, grad, bias, dtype)
    eps = torch.finfo(dtype).eps
    allowed = [max(eps / 4, 1e-5) * max(1.0, float(exact[0].abs().max()))]
    term = max(1.0, float((grad.double() * exact[1]).abs().sum(-1).max()))
    allowed += [
        2 * float((low.double() - high).abs().max()) + 4 * eps * max(term, float(high.abs().max()))
        for low, high in zip(dense[1:], exact[1:])
    ]
    errors = [(ours.double() - high).abs().max() for ours, high in zip((lse, out, *found), exact)]
    shares = torch.stack(errors).cpu() / torch.tensor(allowed, dtype=torch.float64)
    return float(shares.max())  # NaN where one is


def _definition(
    check: Check, query: Tensor, key: Tensor, value: Tensor, grad: Tensor, bias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:  # fmt: skip
    """lse of the keys alone; output with the sink, and the three gradients, in ``dtype``."""
    leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (query, key, value)]
    keys, values = (tensor.repeat_interleave(HEADS // check.kv_heads, 1) for tensor in leaves[1:])
    precise = torch.promote_types(dtype, torch.float32)
    scores = (leaves[0] @ keys.mT * SCALE).to(precise)
    if bias is not None:
        scores = scores + bias.to(precise)
    scores = scores.masked_fill(~_visible(check, query.device), -torch.inf)
    lse = scores.logsumexp(-1)
    total = torch.logaddexp(lse, torch.full_like(lse, SINK))
    out = torch.exp(scores - total.unsqueeze(-1)).to(dtype) @ values
    return lse.detach(), out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))


def _visible(check: Check, device: torch.device) -> Tensor:
    first = check.keys - check.rows
    row = torch.arange(first, check.keys, device=device).unsqueeze(-1)
    column = torch.arange(check.keys, device=device)
    visible = torch.ones(check.rows, check.keys, dtype=torch.bool, device=device)
    if check.causal or check.band is not None:
        visible = column <= row
    if check.band == "window":
        visible = visible & (row - column < WINDOW)
    if check.band == "documents":
        visible = visible & (row // DOCUMENT == column // DOCUMENT)
    return visible


def _band(check: Check, device: str) -> Band | None:
    if check.band is None:
        return None
    if check.band == "documents":
        starts = [b * check.rows + i for b in range(BATCH) for i in range(0, check.rows, DOCUMENT)]
        limits = torch.tensor([*starts, BATCH * check.rows], dtype=torch.int32, device=device)
        return Band(limits=(limits, DOCUMENT))
    return Band(WINDOW if check.band == "window" else None)


def _laid(tensor: Tensor, layout: str) -> Tensor:
    if layout == "rows":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor.contiguous()


def _stock_backward(query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> None:
    """By cuDNN, through the operators that stock attention calls."""
    out, lse = KERNELS["cudnn"].forward(query, key, value, None, True, SCALE)
    state = torch.zeros((), dtype=torch.int64, device=query.device)
    torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        grad, query, key, value, out, lse.unsqueeze(-1), state, state, None, None, None,
        query.shape[2], key.shape[2], 0.0, True, scale=SCALE,
    )  # fmt: skip
