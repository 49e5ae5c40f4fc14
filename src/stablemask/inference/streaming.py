"""Decoding with a bounded cache: each layer keeps its latest keys, so that a stream may go on for ever.

A window of N is a sliding-window mask in every layer: a token sees itself and the N - 1 tokens before
it. Nothing else is kept, no first tokens either, and nothing is approximated: the logits are those of
one pass over the whole text with that mask. Keys stay as they were cached, rotated by their absolute
position, which goes on growing; RoPE sees only its differences, below N. The pseudo mass is held at
that of position N - 1: a row never sees more keys than that position does.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    PreTrainedModel,
    StoppingCriteriaList,
    SuppressTokensAtBeginLogitsProcessor,
)
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)
from transformers.generation import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from ..errors import InputError
from ..hf.settings import changed_settings, model_settings
from ..models.cache import CACHE
from .model import changing_rope, last_logits

# What looks at the number of ids, and at none of them.
COUNTING = (
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
)


def window_cache(model: PreTrainedModel, window: int) -> Cache:
    """A cache that shows each token the latest ``window`` keys of every layer, its own included.

    A layer that has a shorter window of its own keeps that.

    Raises:
        InputError: ``window`` is below 2, or the model keeps something other than keys and values,
            or its forward does not say positions, or its kernel cannot take the mask, or its RoPE
            turns keys by the length of the text, which changes behind their back.
    """
    if window < 2:
        raise InputError(f"window must be at least 2, got {window}")
    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=config)
    known = {type(layer) for layer in cache.layers} <= {DynamicLayer, DynamicSlidingWindowLayer}
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    if not (known and takes_positions) or getattr(config, "attention_chunk_size", None):
        raise InputError(
            f"a window cannot be set for model_type {config.model_type!r}: it needs plain attention "
            "caches and position_ids in every layer"
        )
    if kind := changing_rope(model)[0]:
        raise InputError(
            f"a window needs RoPE of one kind for all lengths, and the model's is {kind}"
        )
    if "flash_attention" in (config._attn_implementation or ""):
        raise InputError("a window needs a model loaded with attn_implementation='sdpa'")
    cache.layers = [
        DynamicSlidingWindowLayer(min(window, getattr(layer, "sliding_window", window)))
        for layer in cache.layers
    ]
    return cache


def cached_logits(model: PreTrainedModel, input_ids: Tensor, cache: Cache, **kwargs: Any) -> Tensor:
    """Read the next tokens of a text into its cache, sliding or not.

    Args:
        input_ids: (batch, length), without padding. In a sliding cache a pass takes memory for
            ``length * (window + length)`` scores of a mask.
        kwargs: go to the model.

    Returns:
        Logits, (batch, length or ``logits_to_keep``, vocabulary).
    """
    past = cache.get_seq_length()
    positions = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)
    return model(
        input_ids=input_ids,
        attention_mask=_sliding_masks(model, input_ids, cache),
        position_ids=positions[None],
        use_cache=True,
        **{CACHE: cache},
        **kwargs,
    ).logits


def _sliding_masks(model: PreTrainedModel, input_ids: Tensor, cache: Cache) -> Any:
    """The mask of a pass, or one for each kind of layer; None where the model makes the right one.

    That is a growing cache's, and a causal one, which is all that one token or the first window needs.
    """
    windows: list[Any] = [getattr(layer, "sliding_window", None) for layer in cache.layers]
    if None in windows or not windows:  # which a cache makes as layers come
        return None
    alike = len(set(windows)) == 1
    length = input_ids.shape[1]
    if alike and (length == 1 or cache.get_seq_length() + length <= windows[0]):
        return None
    kinds = ["all"] * len(windows) if alike else model.config.get_text_config().layer_types
    masks = {}
    for kind in set(kinds):
        layer_idx = kinds.index(kind)
        keys, first_key = cache.get_mask_sizes(length, layer_idx)
        row = cache.get_seq_length() + torch.arange(length, device=input_ids.device)
        distance = row[:, None] - (first_key + torch.arange(keys, device=input_ids.device))
        visible = (distance >= 0) & (distance < windows[layer_idx])
        # Additive, the one form that every attention of Transformers takes.
        hidden = torch.finfo(model.dtype).min
        mask = torch.zeros_like(visible, dtype=model.dtype).masked_fill(~visible, hidden)
        masks[kind] = mask.expand(len(input_ids), 1, -1, -1)
    return masks["all"] if alike else masks


@contextmanager
def mass_held(model: PreTrainedModel, window: int) -> Iterator[None]:
    """StableMask's mass falls no further than at the last position whose whole past is in the window."""
    config: Any = model.config.get_text_config(decoder=True)
    if getattr(config, "stablemask", None) is None:
        yield
        return
    hold = model_settings(config).get("hold")
    with changed_settings(config, hold=window - 1 if hold is None else min(window - 1, hold)):
        yield


def decode_with_window(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    *,
    window: int,
    streamer: BaseStreamer | None = None,
    **_: Any,
) -> Tensor:
    """The decoding loop of a stream, for ``model.generate(custom_generate=...)``.

    Transformers' own loop copies a growing row of ids, and a mask of it, at each token; this one
    takes the same memory and time for every token. ``logits_processor`` sees the last ``window`` ids;
    what counts ids counts all of them.

    Args:
        input_ids: (1, length). Longer ones than the window are read in pieces of
            ``generation_config.prefill_chunk_size``, by default of the window.

    Returns:
        The ids with the new ones, (1, length + new).
    """
    with mass_held(model, window):
        cache = window_cache(model, window)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        last = last_logits(model, 1)
        for chunk in input_ids.split(generation_config.prefill_chunk_size or window, dim=1):
            logits = cached_logits(model, chunk, cache, **last)
        recent = input_ids[:, -window:]
        new: list[int] = []
        while len(new) < generation_config.max_new_tokens:
            scores: Any = logits[:, -1].float()
            counted = recent[:, :1].expand(-1, input_ids.shape[1] + len(new))  # no copy
            for process in logits_processor:
                scores = process(counted if isinstance(process, COUNTING) else recent, scores)
            if generation_config.do_sample:
                token = torch.multinomial(scores.softmax(-1), 1)
            else:
                token = scores.argmax(-1, keepdim=True)
            new.append(int(token))
            if streamer is not None:
                streamer.put(token.cpu())
            recent = torch.cat((recent, token), dim=1)[:, -window:]
            if stopping_criteria(recent, scores).all():
                break
            logits = cached_logits(model, token, cache)
        if streamer is not None:
            streamer.end()
    return torch.cat((input_ids, input_ids.new_tensor([new])), dim=1)
