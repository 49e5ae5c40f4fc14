"""Attention on a fixed piece of the validation text, looked at with each evaluation.

So that a sink's birth, and the pseudo mass that takes its place, show while the model trains.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ...errors import InputError
from ...evaluation.attention_maps import LayerAttention, capture_attention, last_hidden_state
from ...inference.model import evaluating
from ..sharding import is_sharded


class Probe(TrainerCallback):
    """Adds to each evaluation's log what the heads do on one sequence:

        eval_first_token_attention       mean attention on token 0, over layers, heads and rows
        eval_first_token_attention_max   that of the layer with the most
        eval_mask_ratio                  mean share of what carries no value, the pseudo mass or a
                                         sink, over layers, heads and rows; 0 for softmax

    The definitions are those of :mod:`stablemask.evaluation.sinks`: row 0, which sees nothing but token
    0, is left out of the first two. Rows of n tokens that attend evenly give (ln n - 0.42) / (n - 1) to
    token 0, 1.1 % at 512. Weights, gradients and random numbers stay as they are.

    The main process does it alone, while the others go on to the next step; with a model in shards all
    do. A model whose attention cannot be captured is not probed, and a line on stderr says so.

    Args:
        input_ids: a sequence of 2 tokens or more, without padding, (n,).
    """

    def __init__(self, input_ids: Tensor) -> None:
        self._input_ids: Tensor | None = input_ids

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        model: Any = None,
        **_: Any,
    ) -> None:
        assert logs is not None
        if self._input_ids is None or "eval_loss" not in logs:
            return
        if not (state.is_world_process_zero or is_sharded(model)):
            return
        try:
            logs |= attention_on(model, self._input_ids)
        except InputError as error:
            self._input_ids = None
            if state.is_world_process_zero:
                tqdm.write(f"attention is not probed: {error}", file=sys.stderr)


def attention_on(model: Any, input_ids: Tensor) -> dict[str, float]:
    """What :class:`Probe` logs.

    Raises:
        InputError: the model's attention cannot be captured, or the tokens do not fit it.
    """
    if len(input_ids) < 2:
        raise InputError(f"the sequence must have at least 2 tokens, got {len(input_ids)}")
    if not isinstance(model, PreTrainedModel) and hasattr(model, "get_base_model"):
        model = model.get_base_model()  # of PEFT, which has put its adapter into the layers
    layers: list[Tensor] = []

    def keep_means(attention: LayerAttention) -> None:
        means = (attention.real[..., 1:, 0].mean(), attention.pseudo.mean())
        layers.append(torch.stack(means).float())

    # What is compiled would leave out the hooks of a capture.
    eager = torch.compiler.set_stance("force_eager")
    with _own_sequences(model), eager, capture_attention(model, keep_means):
        if is_sharded(model):  # whose outermost module gathers what the layers share
            with evaluating(model):
                ids = input_ids[None].to(model.device)
                model(input_ids=ids, use_cache=False, logits_to_keep=1)
        else:
            last_hidden_state(model, input_ids)
    first_token, mask = torch.stack(layers, dim=1).cpu()
    return {
        "eval_first_token_attention": first_token.mean().item(),
        "eval_first_token_attention_max": first_token.max().item(),
        "eval_mask_ratio": mask.mean().item(),
    }


@contextmanager
def _own_sequences(model: Any) -> Iterator[None]:
    """One of our models reads a whole sequence, also where it shares those it trains on."""
    decoder = model.base_model
    group = getattr(decoder, "sequence_group", None)
    if group is None:
        yield
        return
    decoder.sequence_group = None
    try:
        yield
    finally:
        decoder.sequence_group = group
