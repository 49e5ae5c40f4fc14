"""Bringing StableMask into a pretrained softmax model: log M, shifted from far below."""

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
from ..hf import apply_stablemask
from ..inference.model import evaluating
from ..models import StableMaskConfig
from .options import FinetuneOptions

SHIFT_STEP = 8.0  # how finely a harmless shift is looked for
NO_MASS = -1e4  # a shift that leaves nothing of it


class ShiftSchedule(TrainerCallback):
    """Raise ``config.stablemask["shift"]`` by the same amount each step.

    The shift in force at a step is that of its number alone, so a resumed run goes on with it. It is
    written before the step's evaluation and checkpoint, and beside its losses in the log. At 0 the
    entry goes.
    """

    def __init__(
        self, settings: dict[str, Any], shift_from: float, shift_to: float, shift_steps: int
    ) -> None:
        self.settings = settings
        self.shift_from = shift_from
        self.shift_to = shift_to
        self.shift_steps = shift_steps

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
        batch: what the model's forward takes, to find out how far where ``shift_from`` is None and
            there are steps to go.

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
        shift_from = options.shift_from
        if shift_from is None:
            shift_from = options.shift_to
            if options.shift_steps != 0:
                shift_from = min(harmless_shift(model, config.stablemask, batch), shift_from)
    except ValueError as error:
        raise InputError(f"{options.model} cannot be adapted: {error}") from error
    assert options.shift_steps is not None
    return ShiftSchedule(config.stablemask, shift_from, options.shift_to, options.shift_steps)


def harmless_shift(
    model: PreTrainedModel, settings: dict[str, Any], batch: dict[str, Tensor]
) -> float:
    """The highest multiple of -8 at which the pseudo mass changes no logit of a batch."""

    def logits(shift: float) -> Tensor:
        settings["shift"] = shift
        return model(**batch).logits

    with evaluating(model):
        plain = logits(NO_MASS)
        shift = -SHIFT_STEP
        while not torch.equal(logits(shift), plain):
            shift -= SHIFT_STEP
    return shift
