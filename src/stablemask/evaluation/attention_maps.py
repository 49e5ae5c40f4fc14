"""The attention of any decoder, captured layer by layer while it runs.

The fast kernels store no attention map. During a capture a Transformers model runs an attention that
computes every weight, densely and in float32, from what its own attention is called with; our decoder
runs as ever, and the weights of a layer are computed again beside it. A layer's weights are handed on
before the next layer runs, so that sums over them need the memory of one layer.

Shapes: B batch, H heads, L layers, q queries, k keys, n tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ..errors import InputError
from ..hf.attention import layer_sink_logits
from ..inference.model import check_length, check_token_ids, evaluating
from ..models.layers import StableMaskAttention
from ..models.modeling import ATTN_IMPLEMENTATION

CAPTURE = "stablemask_capture"

T = TypeVar("T")


class LayerAttention(NamedTuple):
    """Attention of one layer; ``real.sum(-1) + pseudo`` is 1 in every row that sees a key.

    Attributes:
        layer: its number in the model.
        real: what a row gives to each real token, (B, H, q, k), float32 or better.
        pseudo: what it gives to the pseudo mass, a sink or a front token, which are none of the text,
            (B, H, q).
    """

    layer: int
    real: Tensor
    pseudo: Tensor


class AttentionMaps(NamedTuple):
    """Attention of one sequence; ``real.sum(-1) + pseudo`` is 1 in every row.

    Attributes:
        real: what row i gives to each real token, (L, H, n, n), float32.
        pseudo: what row i gives to the valueless mass, the mask ratio M / (Z + M), (L, H, n).
    """

    real: Tensor
    pseudo: Tensor


Record = Callable[[LayerAttention], None]


def attention_maps(model: PreTrainedModel, input_ids: Tensor) -> AttentionMaps:
    """The attention of every layer and head on one sequence without padding, on the CPU.

    Memory grows with L H n^2; that of :func:`reduce_attention` with H n^2.

    Args, Raises: as in :func:`reduce_attention`; InputError also for layers of unlike head counts.
    """
    maps = reduce_attention(
        model, input_ids, lambda layer: (layer.real[0].float().cpu(), layer.pseudo[0].float().cpu())
    )
    real, pseudo = zip(*maps, strict=True)
    if len({len(heads) for heads in pseudo}) > 1:
        raise InputError("the layers differ in their number of heads; use reduce_attention")
    return AttentionMaps(torch.stack(real), torch.stack(pseudo))


def reduce_attention(
    model: PreTrainedModel, input_ids: Tensor, reduce: Callable[[LayerAttention], T]
) -> list[T]:
    """What ``reduce`` makes of the attention of each layer, in order, on one sequence.

    Args:
        model: our decoder, or any decoder whose attention goes through Transformers' attention
            interface, with softmax, learned sinks or StableMask.
        input_ids: (n,) or (1, n), without padding.
        reduce: called with the attention of a layer, (1, H, n, n), before the next layer runs.

    Raises:
        InputError: the model's attention cannot be captured, the input is not one sequence, or it is
            longer than a learned position table.
    """
    if input_ids.dim() not in (1, 2) or (input_ids.dim() == 2 and len(input_ids) != 1):
        raise InputError(
            f"input_ids must be one sequence, (n,) or (1, n), got {tuple(input_ids.shape)}"
        )
    reduced: list[T] = []
    with capture_attention(model, lambda layer: reduced.append(reduce(layer))):
        last_hidden_state(model, input_ids.reshape(-1))
    return reduced


@contextmanager
def capture_attention(model: PreTrainedModel, record: Record) -> Iterator[None]:
    """Calls ``record`` with the attention of each layer that runs inside the ``with`` block.

    The model computes there what it computes elsewhere; call it without padding or a cache, and under
    ``torch.no_grad``. Afterwards, also after an error, its own attention is back.

    Raises:
        InputError: the model's attention cannot be captured.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"attention is captured in language models, got {type(model).__name__}")
    ours = [module for module in model.modules() if isinstance(module, StableMaskAttention)]
    with ExitStack() as undo:
        capture = _Capture(record)
        undo.callback(_CAPTURE.reset, _CAPTURE.set(capture))
        for module in ours:
            hook = module.register_forward_pre_hook(_record_ours, with_kwargs=True)
            undo.callback(hook.remove)
        if not ours:
            for config in _configs(model):
                undo.callback(
                    setattr, config, "_attn_implementation_internal", config._attn_implementation
                )
                if config._attn_implementation == ATTN_IMPLEMENTATION:
                    capture.stablemask.add(id(config))
                config._attn_implementation_internal = CAPTURE
        yield
        if capture.layers == 0:
            raise InputError(
                f"the attention of {type(model).__name__} cannot be captured: its layers do not call "
                "Transformers' attention interface"
            )


def last_hidden_state(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(n, hidden) of one sequence (n,), without cache, mask or dropout."""
    if not isinstance(model, PreTrainedModel):
        raise InputError(f"a language model is needed, got {type(model).__name__}")
    check_length(model, len(ids), f"a sequence of {len(ids)} tokens")
    check_token_ids(model, ids)
    decoder: Any = model.base_model
    with evaluating(model):
        return decoder(input_ids=ids[None].to(model.device), use_cache=False).last_hidden_state[0]


@dataclass
class _Capture:
    """Where the layers' attention goes; ``stablemask`` holds ids of configurations that run it."""

    record: Record
    layers: int = 0
    stablemask: set[int] = field(default_factory=set)

    def add(self, module: nn.Module, real: Tensor, pseudo: Tensor) -> None:
        number = getattr(module, "layer_idx", None)
        self.record(LayerAttention(self.layers if number is None else number, real, pseudo))
        self.layers += 1


_CAPTURE: ContextVar[_Capture] = ContextVar("capture")


def _configs(model: PreTrainedModel) -> list[Any]:
    """The configurations that the modules of a model read, each once."""
    found = (getattr(module, "config", None) for module in model.modules())
    return list({id(c): c for c in found if isinstance(c, PreTrainedConfig)}.values())


def _capturing_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention by its definition, behind Transformers' attention interface."""
    is_causal = getattr(module, "is_causal", True)
    q_len, kv_len = query.shape[2], key.shape[2]
    scores = _scores(query, key, scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is None and is_causal:
        attention_mask = torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device)
        attention_mask = attention_mask.tril(kv_len - q_len)
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, -torch.inf)
        else:
            scores = scores + attention_mask
    capture = _CAPTURE.get()
    config: Any = getattr(module, "config", None)
    sinks = kwargs.get("s_aux")
    if is_causal and (
        id(config) in capture.stablemask or getattr(config, "stablemask", None) is not None
    ):
        sinks = layer_sink_logits(module, query, kv_len, attention_mask, **kwargs)
    elif sinks is not None:
        sinks = sinks[:, None]
    real, pseudo = _shares(scores, sinks)
    if is_causal:
        capture.add(module, real, pseudo)
    groups = query.shape[1] // value.shape[1]
    output = real @ value.to(real.dtype).repeat_interleave(groups, dim=1)
    return output.to(value.dtype).transpose(1, 2).contiguous(), None


def _mask_always(*args: Any, **kwargs: Any) -> Tensor | None:
    """Every mask in full, sliding windows and chunks included."""
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(*args, **kwargs)


AttentionInterface.register(CAPTURE, _capturing_attention_forward)
AttentionMaskInterface.register(CAPTURE, _mask_always)


@torch.no_grad()
def _record_ours(module: StableMaskAttention, args: tuple[Tensor], inputs: dict[str, Any]) -> None:
    """A forward pre-hook of our decoder's attention."""
    query, key, _value, sinks, _front = module.terms(
        args[0], inputs["sink_logits"], inputs["rotary"]
    )
    scores = _scores(query, key, module.head_dim**-0.5)
    row = torch.arange(scores.shape[-1], device=scores.device)
    distance = row[:, None] - row
    slopes = inputs["alibi_slopes"]
    if slopes is not None:
        scores = scores - slopes[:, None, None] * distance
    _CAPTURE.get().add(module, *_shares(scores.masked_fill(distance < 0, -torch.inf), sinks))


def _scores(query: Tensor, key: Tensor, scaling: float | None) -> Tensor:
    """(B, H, q, k), in float32 or better."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    key = key.to(dtype).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return query.to(dtype) @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)


def _shares(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """What each row gives to every key, (B, H, q, k), and to its sink, (B, H, q); 0 where it sees none."""
    if sinks is None:
        sinks = scores.new_full((1,), -torch.inf)
    sink = sinks.to(scores.dtype).expand(scores.shape[:-1])[..., None]
    logits = torch.cat((scores, sink), dim=-1)
    sees_none = (logits == -torch.inf).all(dim=-1, keepdim=True)
    shares = torch.softmax(logits, dim=-1).masked_fill(sees_none, 0.0)
    return shares[..., :-1], shares[..., -1]
