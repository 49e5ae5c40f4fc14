"""Bringing StableMask into a pretrained softmax model: log M, shifted from far below."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ..errors import InputError
from ..evaluation.attention_maps import LayerAttention, reduce_attention
from ..hf import apply_stablemask
from ..hf.settings import changed_settings
from ..inference.model import evaluating
from ..models import StableMaskConfig
from .options import FinetuneOptions

SHIFT_STEP = 8.0  # how finely a harmless shift is looked for
NO_MASS = -1e4  # a shift that leaves nothing of it
FIT_STEP = 0.5  # how finely the last shift is chosen
MEASURED = 1024  # tokens of a text whose scores are looked at, for all pairs of them are held
BEARABLE = 0.25  # nats that the mass may cost before the model has been trained with it


class ShiftSchedule(TrainerCallback):
    """Raise ``config.stablemask["shift"]`` by the same amount each step.

    The shift in force at a step is that of its number alone, so a resumed run goes on with it. It is
    written before the step's evaluation and checkpoint, and beside its losses in the log. At 0 the
    entry goes.

    Args:
        before: in force until the first step, so that the evaluation before it is of the model as it was;
            default ``shift_from``.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        shift_from: float,
        shift_to: float,
        shift_steps: int,
        *,
        before: float | None = None,
    ) -> None:
        self.settings = settings
        self.shift_from = shift_from
        self.shift_to = shift_to
        self.shift_steps = shift_steps
        self.before = shift_from if before is None else before

    def shift_at(self, step: int) -> float:
        if step >= self.shift_steps:
            return self.shift_to
        left = 1 - step / self.shift_steps
        return self.shift_to + left * (self.shift_from - self.shift_to)

    def set_step(self, step: int) -> None:
        shift = self.shift_at(step)
        if shift:
            self.settings["shift"] = shift
        else:
            self.settings.pop("shift", None)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step:
            self.set_step(state.global_step)
        else:
            self.settings["shift"] = self.before

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.set_step(state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.set_step(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        assert logs is not None
        logs["shift"] = self.settings.get("shift", 0.0)


def adapt(
    model: PreTrainedModel, options: FinetuneOptions, batch: dict[str, Tensor]
) -> ShiftSchedule:
    """Give a softmax model StableMask, shifted so far that it computes what it did.

    Args:
        batch: held-out ``input_ids``, ``attention_mask`` and ``labels``, padded on the right: what shifts
            that are not given are found with.

    Raises:
        InputError: the model has StableMask already or cannot have it, or a setting is out of range.
    """
    config: Any = model.config.get_text_config(decoder=True)
    softmax = not isinstance(config, StableMaskConfig) or config.attention == "softmax"
    if not softmax or getattr(config, "stablemask", None) is not None:
        raise InputError(f"{options.model} is no softmax model to adapt; leave out --adapt")
    try:
        apply_stablemask(
            model,
            gamma=options.gamma,
            horizon=options.horizon,
            start=options.start,
            hold=options.hold,
        )
        shift_from, shift_to = _shifts(model, options, batch)
    except ValueError as error:
        raise InputError(f"{options.model} cannot be adapted: {error}") from error
    assert options.shift_steps is not None
    # A first shift that was asked for may change something, and the mass may come at once.
    before = None if options.shift_from is None and options.shift_steps else NO_MASS
    return ShiftSchedule(
        config.stablemask, shift_from, shift_to, options.shift_steps, before=before
    )


def _shifts(
    model: PreTrainedModel, options: FinetuneOptions, batch: dict[str, Tensor]
) -> tuple[float, float]:
    """The first and the last shift; those that are not given are found with a batch."""
    shift_from, shift_to = options.shift_from, options.shift_to
    at_once = options.shift_steps == 0
    if shift_to is not None and (shift_from is not None or at_once):
        return shift_to if shift_from is None else shift_from, shift_to
    harmless = harmless_shift(model, batch)
    if shift_to is None:
        shift_to = fitting_shift(model, batch, harmless)
        if shift_from is not None and shift_from > shift_to:
            raise ValueError(
                f"shift_from ({shift_from:g}) is above the {shift_to:g} that its own scores on the first "
                "token ask for; give shift_to as well"
            )
    if shift_from is None:
        shift_from = shift_to if at_once else min(harmless, shift_to)
    return shift_from, shift_to


def harmless_shift(model: PreTrainedModel, batch: dict[str, Tensor]) -> float:
    """The highest multiple of -8 at which the pseudo mass changes no logit of a batch."""

    def logits(shift: float) -> Tensor:
        inputs = {name: batch[name] for name in batch if name != "labels"}
        with _shifted(model, shift):
            return model(**inputs).logits

    plain = logits(NO_MASS)
    shift = -SHIFT_STEP
    while not torch.equal(logits(shift), plain):
        shift -= SHIFT_STEP
    return shift


def fitting_shift(model: PreTrainedModel, batch: dict[str, Tensor], harmless: float) -> float:
    """The shift that makes the mass as large as the model's own sink, or as large as it can bear at once.

    A softmax model leaves its surplus on its first token, whose score there is nearly the same in all rows of
    a head. The mass is given the median of these scores, over rows, heads and layers; then it is lowered
    until the loss of the batch is no more than 0.25 nats above what it is without.

    Args:
        batch: as :func:`adapt` takes it.
        harmless: a shift that changes nothing, where the search ends.
    """
    with _shifted(model, harmless):
        scores = torch.cat([_over_the_mass(model, ids[:MEASURED]) for ids in _texts(batch)])
    # Steep rates leave late rows a mass of 0, beside which nothing can be measured.
    scores = scores[scores.isfinite()]
    if not len(scores):
        return 0.0
    median = harmless + scores.median().item()
    shift = min(0.0, math.floor(median / FIT_STEP) * FIT_STEP)

    def loss(shift: float) -> float:
        with _shifted(model, shift):
            return model(**batch).loss.item()

    highest = loss(harmless) + BEARABLE
    while shift > harmless and not loss(shift) <= highest:
        shift -= FIT_STEP
    return max(shift, harmless)


def _over_the_mass(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """By how much each row's score on the first token exceeds its log M, in all layers, flat."""

    def compare(layer: LayerAttention) -> Tensor:
        return (layer.real[..., 1:, 0] / layer.pseudo[..., 1:]).log().flatten().cpu()

    return torch.cat(reduce_attention(model, ids, compare))


def _texts(batch: dict[str, Tensor]) -> list[Tensor]:
    """The sequences of a batch without their padding."""
    pairs = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
    return [ids[real] for ids, real in pairs]


@contextmanager
def _shifted(model: PreTrainedModel, shift: float) -> Iterator[None]:
    """The mass shifted, no dropout, no gradients."""
    config = model.config.get_text_config(decoder=True)
    with evaluating(model), changed_settings(config, shift=shift):
        yield
