"""``attn_implementation="stablemask"``: what any Transformers decoder calls for its attention.

A model hands over query, key and value, a mask where causality alone does not say it all, and
``position_ids``. Everything else the pseudo mass needs stands in ``config.stablemask``, which is read
at every forward pass, and written where the name is chosen (`guard.py`); None there is no mass. Shapes: B batch, H query heads, q and kv lengths.
"""

import warnings
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..attention import sink_attention
from ..models.masks import Finding, can_be_read, merged_documents, report
from ..models.mass import sink_logits_at
from ..models.modeling import ATTN_IMPLEMENTATION
from ..models.settings import (
    SHIFT_PARAMETER,
    WATCHED,
    of_layer,
    pseudo_sink_logits,
    without_shift,
)
from .settings import context_of, model_settings

_UNKNOWN_TERMS = {
    "softcap": "soft-capping of the scores, which no flash kernel gives a logsumexp for",
    "position_bias": "a bias of its own",
}
# Modules of an attention whose keys are not its whole past: it tells us which in ways of its own, or not at all.
_UNKNOWN_PARTS = {
    "indexer": "keys that it chooses by itself",
    "compressor": "keys made of several tokens each",
}


def stablemask_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """StableMask, or a model's own learned sinks, behind Transformers' attention interface.

    A model that brings learned sinks (gpt-oss) runs them, and a pseudo mass beside them only where
    ``config.stablemask`` asks for one. Attention that is not causal (encoders, cross attention, vision
    towers) is left to stock SDPA.

    Args:
        module: the attention layer, with ``config`` and, where it is not causal, ``is_causal = False``.
        query, key, value: (B, H, q, head_dim), and (B, kv_heads, kv, ...) not repeated.
        attention_mask: None (causal, aligned bottom-right), bool or additive (B, 1, q, kv).
        kwargs: ``position_ids``, ``sliding_window``, ``s_aux`` and ``cache`` are read.

    Returns:
        (B, q, H, value_dim), and None in place of the weights.

    Raises:
        ValueError: the layer asks for what this attention does not compute, or hides its positions.
    """
    if not getattr(module, "is_causal", True):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    _refuse_unknown_terms(module, kwargs)
    paged = kwargs.get("cache") is not None or "read_index" in kwargs  # continuous batching
    if kwargs.get("cache") is not None:  # which left it to the attention until Transformers 5.24
        key, value = kwargs["cache"].update(
            key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs
        )
    kwargs["sliding_window"] = window = _sliding_window(module, kwargs)
    q_len, kv_len = query.shape[2], key.shape[2]
    # Not at every decode step, which would wait for the device; and the masks of continuous batching
    # are its own, and part of CUDA graphs.
    if q_len > 1 and not paged and can_be_read(query):
        _check_mask(module, attention_mask, _token_positions(q_len, **kwargs), window)
    if attention_mask is not None:
        window_left = None
    else:
        if kwargs.get("is_causal") is False and q_len > 1:
            raise ValueError(
                f"StableMask is causal, and {type(module).__name__} was asked for is_causal=False"
            )
        # A window that holds every key is none; a compiled graph is not to depend on which.
        holds_all = not torch.compiler.is_compiling() and window is not None and kv_len <= window
        window_left = None if holds_all else window
        if 1 < q_len < kv_len and module.config._attn_implementation != ATTN_IMPLEMENTATION:  # type: ignore[union-attr]
            # The mask function of "sdpa" gives None there only for the prefill of a static cache.
            key, value = key[:, :, :q_len], value[:, :, :q_len]
    sink_logits = layer_sink_logits(module, query, key.shape[2], attention_mask, **kwargs)
    # Not `getattr`, which takes a microsecond to find that there is none.
    attend = vars(module).get(WATCHED) or sink_attention
    out = attend(
        query,
        key,
        value,
        sink_logits,
        attn_mask=attention_mask,
        window=window_left,
        dropout_p=dropout,
        scale=scaling,
    )
    return out.transpose(1, 2).contiguous(), None


def dispatch_sdpa(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """Stock SDPA, but for a model whose configuration asks for StableMask."""
    if getattr(getattr(module, "config", None), "stablemask", None) is None:
        return sdpa_attention_forward(module, *args, **kwargs)
    return stablemask_attention_forward(module, *args, **kwargs)


def layer_sink_logits(
    module: nn.Module,
    query: Tensor,
    kv_len: int,
    attention_mask: Tensor | None,
    *,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """The sink logit of each row, broadcastable to (B, H, q): log M, the model's own sinks, or both.

    Args:
        module, query, attention_mask: as :func:`stablemask_attention_forward` takes them.
        kv_len: number of keys.
        position_ids: (B or 1, q), or (axes, B, q) where the first axis counts tokens.
        sliding_window: of this layer, or None.
        kwargs: ``s_aux``, where a model has learned sinks, is one per head, (H,), or None in a layer
            that has none (MiMo V2).
    """
    own = None if kwargs.get("s_aux") is None else kwargs["s_aux"][:, None]
    config: Any = module.config
    settings = getattr(config, "stablemask", None)  # once, for Transformers looks in several places
    if settings is None:
        if "s_aux" in kwargs or "stablemask" in vars(config):  # None was written: no mass
            return query.new_full((1, 1), -torch.inf) if own is None else own
        settings = config.stablemask = model_settings(config)  # the name was written past the guard
    positions = _token_positions(query.shape[2], position_ids)
    if positions is None:
        positions = _rows_of_the_mask(module, query, kv_len, attention_mask, sliding_window)
    pseudo = _pseudo(module, config, settings, positions, query)
    return pseudo if own is None else torch.logaddexp(pseudo, own.float())


def _token_positions(q_len: int, position_ids: Tensor | None = None, **_: Any) -> Tensor | None:
    """What a model tells of its rows' positions, (B or 1, q)."""
    if not isinstance(position_ids, Tensor) or position_ids.shape[-1] != q_len:
        return None
    return position_ids[0] if position_ids.dim() == 3 else position_ids


@dataclass(slots=True)
class _Found:
    """What a layer found, for those after it: models hand all their layers the same positions."""

    layer: int
    positions: weakref.ref[Tensor]
    config: Any
    settings: dict[str, Any]
    sink_logits: Tensor
    device: torch.device


# Looked up in every layer, the mass makes a decode step of a Llama of 8 layers 3 to 4 % slower (CPU time).
_found: _Found | None = None


def _pseudo(
    module: nn.Module, config: Any, settings: Any, positions: Tensor, query: Tensor
) -> Tensor:
    """Log of the mass of each row, broadcastable to (B, H, q)."""
    global _found
    layer: Any = getattr(module, "layer_idx", None)
    found = _found
    shared = (
        isinstance(layer, int)
        and isinstance(settings, dict)
        and not isinstance(settings.get("shift"), (list, tuple))
        and SHIFT_PARAMETER not in module._parameters
        and not torch.compiler.is_compiling()
    )
    if (
        shared
        and found is not None
        and found.layer < layer  # else it is another pass's, and positions may be others by now
        and found.positions() is positions
        and found.config is config
        and found.settings == settings
        and found.device == query.device
    ):
        found.layer = layer
        return _local_heads(module, found.sink_logits, query)
    sink_logits = _pseudo_of_layer(module, config, positions.to(query.device), layer)
    if shared:
        _found = _Found(
            layer, weakref.ref(positions), config, dict(settings), sink_logits, query.device
        )
    return _local_heads(module, sink_logits, query)


def _pseudo_of_layer(
    module: nn.Module, config: Any, positions: Tensor, layer: int | None
) -> Tensor:
    num_heads = getattr(config, "num_attention_heads", None)
    trained = module._parameters.get(SHIFT_PARAMETER)
    given = config.stablemask if trained is None else without_shift(config.stablemask)
    sink_logits = None
    if isinstance(num_heads, int):
        sink_logits = sink_logits_at(
            given,
            num_heads,
            lambda: context_of(config),
            positions,
            lambda: model_settings(config, given),
            layer,
        )
    if sink_logits is None:
        settings = of_layer(model_settings(config, given), layer)
        sink_logits = pseudo_sink_logits(settings, config.num_attention_heads, positions)
    if trained is not None:
        sink_logits = sink_logits + trained[:, None]
    return sink_logits


def _sliding_window(module: nn.Module, kwargs: dict[str, Any]) -> int | None:
    """The window of a layer; our mask function leaves it out of the mask."""
    if "sliding_window" in kwargs:
        return kwargs["sliding_window"] or None
    # A few (PhiMoE, Qwen2-MoE, Doge) do not name it: the rule of Transformers' caches.
    window = getattr(module.config, "sliding_window", None)
    if not window:
        return None
    types = getattr(module.config, "layer_types", None)
    return window if types is None or types[module.layer_idx] == "sliding_attention" else None


def _refuse_unknown_terms(module: nn.Module, kwargs: dict[str, Any]) -> None:
    for known, present in ((_UNKNOWN_TERMS, kwargs), (_UNKNOWN_PARTS, module._modules)):
        for name, meaning in known.items():
            if present.get(name) is not None:
                raise ValueError(
                    f"StableMask cannot run in {type(module).__name__}: its attention has {meaning} "
                    f"({name})"
                )


def _rows_of_the_mask(
    module: nn.Module,
    query: Tensor,
    kv_len: int,
    attention_mask: Tensor | None,
    sliding_window: int | None,
) -> Tensor:
    """Positions for the few models whose attention is not told them, (B or 1, q)."""
    if attention_mask is None and sliding_window is None:
        rows = torch.arange(kv_len - query.shape[2], kv_len, device=query.device)
        return rows[None]
    partial = sliding_window or getattr(module.config, "attention_chunk_size", None)
    if attention_mask is None or attention_mask.dtype != torch.bool or partial:
        raise ValueError(
            f"StableMask cannot run in {type(module).__name__} here: neither position_ids nor a mask "
            "that counts the past reaches the layer, so the absolute positions are not known"
        )
    # A row that sees all of its past stands behind as many keys.
    return (attention_mask[:, 0].sum(-1) - 1).clamp(min=0)


# Masks that a layer of the pass has looked at: models hand all their layers the same one or two.
_checked: tuple[weakref.ref[Tensor], ...] = ()


def _check_mask(
    module: nn.Module,
    mask: Tensor | None,
    position_ids: Tensor | None,
    sliding_window: int | None,
) -> None:
    """What can be said of a mask by reading it, None or (B, 1, q, kv)."""
    global _checked
    findings: list[Finding | None] = []
    first = getattr(module, "layer_idx", None) in (None, 0)
    if first:
        _checked = ()
    if mask is not None and not any(other() is mask for other in _checked):
        alive = (other for other in _checked if other() is not None)
        _checked = (*alive, weakref.ref(mask))
        findings.append(_later_tokens_seen(module, mask))
    if first and position_ids is not None:
        findings.append(merged_documents(position_ids, mask))
        if mask is not None and mask.dtype == torch.bool:
            findings.append(_padding_counted(mask[:, 0], position_ids, sliding_window))
    report(module, *findings)


def _later_tokens_seen(module: nn.Module, mask: Tensor) -> Finding:
    q_len, kv_len = mask.shape[-2:]
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    name = type(module).__name__

    def refuse() -> None:
        raise ValueError(
            f"StableMask cannot run in {name} here: the mask lets a token see later ones (as in a picture "
            "or a prefix), and StableMask is causal"
        )

    return seen.triu(kv_len - q_len + 1).any(), refuse


def _padding_counted(
    mask: Tensor, position_ids: Tensor, sliding_window: int | None
) -> Finding | None:
    """Left padding without position_ids: Transformers then counts the padding as positions."""
    visible = mask.sum(-1)
    starts_late = ~mask[..., 0] & (visible > 0)
    if sliding_window is not None:
        if mask.shape[-2] != mask.shape[-1]:
            return None
        # Further on the window hides the first key, and rows of padding on the right see too few.
        starts_late &= mask.diagonal(dim1=-2, dim2=-1) & (visible < sliding_window)
    return (starts_late & (visible - 1 != position_ids)).any(), _warn_of_padding_counted


def _warn_of_padding_counted() -> None:
    warnings.warn(
        "the position_ids count padding: a left-padded batch needs position_ids = "
        "(attention_mask.cumsum(-1) - 1).clamp(min=0), as `generate` makes them, for StableMask's "
        "mass follows the absolute position of a token in its own text",
        stacklevel=2,
    )


def _local_heads(module: nn.Module, sink_logits: Tensor, query: Tensor) -> Tensor:
    """The rows of this rank's heads under tensor parallelism."""
    heads, local_heads = sink_logits.shape[-2], query.shape[1]
    if heads in (1, local_heads):
        return sink_logits
    from ..distributed.tensor_parallel import head_shards

    projection: Any = getattr(module, "q_proj", module)
    return head_shards(projection, heads, local_heads).local("sink_logits", sink_logits)
