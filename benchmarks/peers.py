"""What others offer for attention with a sink, each called as its documentation has it.

The packages are those of the extra ``bench``; without one its rows are not timed.
"""

import functools
import sys
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from . import masks
from .cases import Case, Inputs
from .rows import Row, Run


def _causal_only(build: Callable[[Case, Inputs], Run]) -> Callable[[Case, Inputs], Run]:
    @functools.wraps(build)
    def checked(case: Case, inputs: Inputs) -> Run:
        if case.mask != "causal":
            raise NotImplementedError("timed with the causal mask only")
        return build(case, inputs)

    return checked


def _flex_with_lse(query, key, value, sinks, block_mask):
    grouped = query.shape[1] != key.shape[1]
    out, aux = flex_attention(
        query,
        key,
        value,
        block_mask=block_mask,
        enable_gqa=grouped,
        return_aux=AuxRequest(lse=True),
    )
    kept = torch.sigmoid(aux.lse - sinks.view(1, -1, 1))
    return out * kept.unsqueeze(-1).to(out.dtype)


def _flex_with_zero_key(query, key, value, sinks, block_mask):
    def put_sink(score, batch, head, row, column):
        return torch.where(column == 0, sinks[head], score)

    if query.shape[2] > 1:
        key, value = (F.pad(tensor, (0, 0, 1, 0)) for tensor in (key, value))
    grouped = query.shape[1] != key.shape[1]
    return flex_attention(
        query, key, value, score_mod=put_sink, block_mask=block_mask, enable_gqa=grouped
    )


@functools.cache
def _compiled(function: Callable) -> Callable:
    # One function serves every case; past the limit it would fall to eager, which is dense.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(function, dynamic=True)


def _block_mask(case: Case, extra: int):
    if case.q_len == 1:
        return None
    return create_block_mask(
        lambda batch, head, row, column: row >= column - extra,
        None, None, case.q_len, case.kv_len + extra, device=case.device,
    )  # fmt: skip


@_causal_only
def _build_flex_lse(case: Case, inputs: Inputs) -> Run:
    if case.device == "cpu":
        raise NotImplementedError("compiled FlexAttention returns no lse on the CPU")
    block_mask = _block_mask(case, extra=0)
    return functools.partial(_compiled(_flex_with_lse), *inputs[:3], inputs.sinks, block_mask)


@_causal_only
def _build_flex_zero_key(case: Case, inputs: Inputs) -> Run:
    """The sink as the score of a first key whose value is zero: a cache has it from the start."""
    if case.device == "cpu" and inputs.query.requires_grad:
        raise NotImplementedError("FlexAttention has no backward on the CPU")
    query, key, value = inputs[:3]
    if case.q_len == 1:
        key, value = (F.pad(tensor, (0, 0, 1, 0)) for tensor in (key, value))
    return functools.partial(
        _compiled(_flex_with_zero_key), query, key, value, inputs.sinks, _block_mask(case, extra=1)
    )


def _build_softmax_n(case: Case, inputs: Inputs, path: str) -> Run:
    if case.mask != "causal":
        raise NotImplementedError("timed with the causal mask only")
    if not torch.cuda.is_available():
        # It does without its Triton kernel, which asks for a GPU as it is imported.
        kernel: Any = None
        sys.modules.setdefault("flash_attention_softmax_n.core.flash_attn_triton", kernel)
    import flash_attention_softmax_n

    attend = getattr(flash_attention_softmax_n, f"{path}_attention_n")
    query, key, value = inputs[:3]

    def run() -> Tensor:
        keys, values = key, value
        if case.groups > 1:  # the package has no grouped heads
            keys, values = (t.repeat_interleave(case.groups, 1) for t in (key, value))
        return attend(query, keys, values, softmax_n_param=1, is_causal=case.q_len > 1)

    return run


@_causal_only
def _build_x_transformers(case: Case, inputs: Inputs) -> Run:
    from x_transformers.attend import Attend

    module = Attend(causal=True, heads=case.heads, head_learned_sink=True)
    module.head_attn_sink = torch.nn.Parameter(inputs.sinks)
    if inputs.sinks.requires_grad:
        module.head_attn_sink = inputs.sinks  # the leaf that is differentiated
    return lambda: module(*inputs[:3])[0]


@_causal_only
def _build_gpt_oss(case: Case, inputs: Inputs) -> Run:
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    module: Any = SimpleNamespace(
        num_key_value_groups=case.groups, sinks=inputs.sinks, training=False
    )
    mask = None
    if case.q_len > 1:  # made once for all layers of the model
        lowest = torch.finfo(case.torch_dtype).min
        mask = masks.dense_bias(case).clamp(min=lowest).to(case.torch_dtype).unsqueeze(0)
    scale = case.head_dim**-0.5

    def run() -> Tensor:
        out, _ = eager_attention_forward(module, *inputs[:3], mask, scale)
        return out.transpose(1, 2)

    return run


def peers() -> list[Row]:
    """Their rows, in the order of the tables."""
    # The package calls a context manager of PyTorch that is on its way out, at each call.
    warnings.filterwarnings("ignore", message=".*sdp_kernel.*", category=FutureWarning)
    flash_n, slow_n = (functools.partial(_build_softmax_n, path=path) for path in ("flash", "slow"))
    softmax_n = "flash_attention_softmax_n"
    return [
        Row("flex lse", "learned sink", _build_flex_lse, compiled=True),
        Row("flex zero key", "learned sink", _build_flex_zero_key, compiled=True),
        Row("softmax-n flash", "softmax1", flash_n, dense=True, package=softmax_n),
        Row("softmax-n slow", "softmax1", slow_n, dense=True, package=softmax_n),
        Row(
            "x-transformers", "learned sink", _build_x_transformers,
            dense=True, package="x_transformers", tiles_groups=True,
        ),
        Row(
            "gpt-oss eager", "learned sink", _build_gpt_oss, dense=True, package="transformers"
        ),
    ]  # fmt: skip
