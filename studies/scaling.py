"""Past the training length with all keys, with and without a log-length scaling of the scores, which the authors' code
gives to StableMask alone, so that a comparison gives it to all or to none; and from a window of the latest keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from stablemask.evaluation.streaming import streaming_losses
from stablemask.inference.streaming import window_cache
from stablemask.models.layers import StableMaskAttention

PLAIN, SCALED, WINDOWED = "as trained", "log-length", "window"
FACTOR = 16  # times the training length
TEXTS = 24


def losses_past_the_context(
    model: PreTrainedModel, tokens: Any, context: int
) -> dict[str, list[float]]:
    """Nats within the training length, and from half of the length read on, in each way.

    Args:
        tokens: of validation, of which texts are taken evenly.
    """
    length = FACTOR * context + 1
    step = (len(tokens) - length) // (TEXTS - 1)
    if step < 1:
        return {}
    pieces = [tokens[i * step : i * step + length].astype("int64") for i in range(TEXTS)]
    texts = torch.stack([torch.from_numpy(piece) for piece in pieces])
    found = {}
    for name in (PLAIN, SCALED, WINDOWED):
        with log_length_scaling(model, context) if name == SCALED else nullcontext():
            windowed = name == WINDOWED
            cache = window_cache(model, context) if windowed else DynamicCache(config=model.config)
            losses = streaming_losses(model, texts, cache, chunk_size=context, progress=False)
        by_position = losses.double().mean(0)
        parts = by_position[: context - 1], by_position[FACTOR // 2 * context :]
        found[name] = [round(part.mean().item(), 5) for part in parts]
    return found


@contextmanager
def log_length_scaling(model: PreTrainedModel, context: int) -> Iterator[None]:
    """The scores of row i are multiplied by the logarithm of i + 1 to the base ``context``, from there on."""
    factor: Tensor | float = 1.0

    def see(module: StableMaskAttention, args: tuple[Tensor], inputs: dict[str, Any]) -> None:
        nonlocal factor
        cache = inputs.get("cache")
        past = 0 if cache is None else cache.get_seq_length(module.layer_idx)
        rows = torch.arange(1, args[0].shape[1] + 1, device=args[0].device) + past
        factor = (rows.double().log() / math.log(context)).clamp(min=1)[:, None].to(args[0].dtype)

    with ExitStack() as undo:
        for module in model.modules():
            if isinstance(module, StableMaskAttention):
                hook = module.register_forward_pre_hook(see, with_kwargs=True)
                undo.callback(hook.remove)
                hook = module.q_proj.register_forward_hook(lambda _, __, query: query * factor)
                undo.callback(hook.remove)
        yield
