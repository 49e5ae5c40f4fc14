"""What is timed: a shape, a dtype and a mask, and the tensors made from them.

Letters: B batch, H query heads, K key heads, n query rows, m keys, D head_dim.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

HEADS = 8
_FREE_SLOTS = 64  # of a cache, behind the keys that are filled


@dataclass(frozen=True)
class Case:
    """One cell of a table: every row of the cell computes on tensors of this shape.

    Attributes:
        device: type of the device, such as ``"cpu"``.
        dtype: name of the dtype, such as ``"float32"``.
        q_len, kv_len: equal, or a query of ``q_len`` tokens behind a cache.
        groups: query heads that share a key head.
        mask: a key of ``masks.MASKS``.
        heads: of the query.
    """

    device: str
    dtype: str
    batch: int
    q_len: int
    kv_len: int
    head_dim: int = 64
    groups: int = 1
    mask: str = "causal"
    heads: int = HEADS

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def gamma(self) -> float:
        """StableMask's decay rate, the default of our models."""
        return 1 / self.kv_len

    @property
    def horizon(self) -> int:
        """Of the dense definition; when decoding, half of it is still to come."""
        return self.kv_len if self.q_len == self.kv_len else 2 * self.kv_len


class Inputs(NamedTuple):
    """``query`` and ``grad`` (B, H, n, D), ``key`` and ``value`` (B, K, m, D), ``sinks`` (H,)."""

    query: Tensor
    key: Tensor
    value: Tensor
    sinks: Tensor
    grad: Tensor

    def detached(self) -> "Inputs":
        return Inputs(*(tensor.detach() for tensor in self))


def make_inputs(case: Case) -> Inputs:
    """Tensors in the memory order of a model's; keys behind which there is a cache are views of it.

    The sinks reach from 0 to log(m), so that they take a share of the attention that shows.
    """
    generator = torch.Generator(case.device).manual_seed(0)
    kv_heads = case.heads // case.groups

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=case.torch_dtype, device=case.device, generator=generator)

    def projected(heads: int) -> Tensor:
        return draw(case.batch, case.q_len, heads, case.head_dim).transpose(1, 2)

    def cached() -> Tensor:
        slots = case.kv_len + _FREE_SLOTS
        return draw(case.batch, kv_heads, slots, case.head_dim)[:, :, : case.kv_len]

    query, grad = projected(case.heads), projected(case.heads)
    if case.q_len == case.kv_len:
        key, value = projected(kv_heads), projected(kv_heads)
    else:
        key, value = cached(), cached()
    sinks = torch.linspace(0, math.log(case.kv_len), case.heads, device=case.device)
    return Inputs(
        query.requires_grad_(), key.requires_grad_(), value.requires_grad_(),
        nn.Parameter(sinks.to(case.torch_dtype)), grad,
    )  # fmt: skip
