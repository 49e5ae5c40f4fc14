"""The rows of the tables: stock SDPA (the floor), our op on each backend, the dense definition.

The peers, written by others, are in ``peers.py``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from stablemask.attention import sink_attention, stable_mask_attention
from stablemask.backends import BACKENDS

from . import masks
from .cases import Case, Inputs

MAX_DENSE_LENGTH = 2048  # a dense row keeps several (heads, length, length) tensors a sequence
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Row:
    """One way of computing attention.

    Attributes:
        computes: a key of ``correctness.LOG_MASSES``: what its output must equal.
        build: from a case and its tensors to a function of no arguments that computes the output,
            ``(batch, heads, q_len, head_dim)``. What does not depend on the tensors' values, such as
            a dense mask, is made here and not timed. It raises NotImplementedError with the reason
            where the row cannot serve.
        dense: keeps every score, and so stops at ``MAX_DENSE_LENGTH`` queries.
        package: module that must be installed.
        tiles_groups: query head ``h`` reads key head ``h % kv_heads``, not ``h // groups``.
        is_floor: stock attention, of which the fastest is what ratios are taken to.
        watched: its ratio is what the benchmark is for, and is to be exact.
        detail: on the CPU left out of the longest lengths, and of all shapes but the first.
        compiled: takes seconds to compile for each new shape on the CPU.
    """

    name: str
    computes: str
    build: Callable[[Case, Inputs], Run]
    dense: bool = False
    package: str | None = None
    tiles_groups: bool = False
    is_floor: bool = False
    watched: bool = False
    detail: bool = False
    compiled: bool = False

    def leaves(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """What the backward pass differentiates."""
        tensors = inputs[:3]
        return (*tensors, inputs.sinks) if self.computes == "learned sink" else tensors


def _build_stock(case: Case, inputs: Inputs, kernel: SDPBackend | None = None) -> Run:
    bias = None
    if case.mask != "causal":
        bias = masks.dense_bias(case).to(case.torch_dtype).unsqueeze(0)
        bias = bias.expand(case.batch, case.heads, -1, -1)
    attend = partial(
        F.scaled_dot_product_attention, *inputs[:3], attn_mask=bias,
        is_causal=bias is None and case.q_len > 1, enable_gqa=case.groups > 1,
    )  # fmt: skip
    if kernel is None:
        return attend

    def run() -> Tensor:
        with sdpa_kernel(kernel):
            return attend()

    return run


def _build_ours(case: Case, inputs: Inputs, backend: str) -> Run:
    return partial(
        stable_mask_attention, *inputs[:3], gamma=case.gamma, backend=backend,
        **masks.arguments(case),
    )  # fmt: skip


def _build_learned(case: Case, inputs: Inputs) -> Run:
    given = {name: value for name, value in masks.arguments(case).items() if name != "positions"}
    return lambda: sink_attention(*inputs[:3], inputs.sinks.view(-1, 1), **given)


def _build_definition(case: Case, inputs: Inputs) -> Run:
    """The paper's formula as it stands."""
    if case.mask != "causal":
        raise NotImplementedError("the paper's formula has no other mask")
    query, key, value = inputs[:3]
    n, m, horizon = case.q_len, case.kv_len, case.horizon
    column = torch.arange(horizon, device=query.device)
    visible = column <= column[m - n : m].unsqueeze(-1)
    causal, pseudo = visible.to(query.dtype), (-case.gamma * column * ~visible).to(query.dtype)

    def run() -> Tensor:
        keys, values = (t.repeat_interleave(case.groups, 1) for t in (key, value))
        scores = query @ keys.transpose(-2, -1) * query.shape[-1] ** -0.5
        scores = F.pad(scores, (0, horizon - m))
        weights = torch.softmax(scores * causal + pseudo, -1) * causal
        return weights[..., :m] @ values

    return run


def own_rows(device: str) -> list[Row]:
    """The floor, our op on every backend by name, and the definition."""
    kernels = {}
    if device == "cuda":  # where SDPA's own choice need not be the fastest
        kernels = {
            "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
        }  # fmt: skip
    return [
        Row("sdpa", "softmax", _build_stock, is_floor=True),
        *(
            Row(f"sdpa {name}", "softmax", partial(_build_stock, kernel=kernel), is_floor=True)
            for name, kernel in kernels.items()
        ),
        Row("stablemask", "stablemask", partial(_build_ours, backend="auto"), watched=True),
        Row("learned sink", "learned sink", _build_learned, detail=True),
        *(
            Row(
                f"stablemask {name}", "stablemask", partial(_build_ours, backend=name),
                dense=name == "reference", detail=True, compiled=name == "flex",
            )
            for name in BACKENDS
        ),
        Row("definition", "stablemask, finite", _build_definition, dense=True),
    ]  # fmt: skip


def all_rows(device: str) -> dict[str, Row]:
    """Every row by its name, in the order of the tables."""
    from .peers import peers  # written in terms of Row

    return {row.name: row for row in (*own_rows(device), *peers())}
