"""From a softmax model to a student with a teacher and a text to learn from: what comes before the training."""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data import Corpus
from ...data.cache import hash_of
from ...data.chat import ChatCorpus, pad_conversations
from ...data.mixture import Mixture
from ...errors import InputError
from ...hf import apply_stablemask
from ...models import StableMaskConfig
from ..finetune_options import FinetuneOptions
from ..run import given
from ..self_written import write_texts
from .biases import give_biases, steady_dimensions
from .calibration import FILE, Calibration, calibrate
from .prefix import LENGTH, TEXTS, Prefix, choose_prefix, sample_text
from .reading import InFront, Texts, front_tokens, spread
from .table import measure
from .trainer import Distillation, Schedule
from .watch import FIRST_ROW, Watch

NO_MASS = -1e4  # a shift of log M that leaves nothing of it: softmax
CALIBRATED_ON = 16  # texts
TEXTS_FOLDER = "texts"
HELD_OUT = 20  # of so many texts that the model writes, one is not trained on


@dataclass(frozen=True)
class AdaptingData:
    """What is trained on and held out, in the form of the other corpora."""

    tokenizer: PreTrainedTokenizerBase
    train: Any
    validation: Any
    key: str


def make_stablemask(model: PreTrainedModel, options: FinetuneOptions) -> None:
    """Give a softmax model StableMask without any mass as yet: it computes what it did.

    Raises:
        InputError: the model has StableMask already or cannot have it, or a setting is out of range.
    """
    config: Any = model.config.get_text_config(decoder=True)
    is_softmax = not isinstance(config, StableMaskConfig) or config.attention == "softmax"
    if not is_softmax or getattr(config, "stablemask", None) is not None:
        raise InputError(f"{options.model} is no softmax model to adapt; leave out --adapt")
    try:
        apply_stablemask(
            model,
            gamma=options.gamma,
            horizon=options.horizon,
            start=options.start,
            hold=options.hold,
            shift=NO_MASS,
        )
        # A few tokens, for what cannot be calibrated is to be known before any text is written.
        ids = torch.zeros(1, min(FIRST_ROW, given(options.context)), dtype=torch.long)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        calibrate(model, Watch(model), [batch], None)
    except ValueError as error:
        raise InputError(f"{options.model} cannot be adapted: {error}") from error


def find_prefix(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Corpus | ChatCorpus | None,
    options: FinetuneOptions,
    folder: Path | None = None,
) -> Prefix:
    """The prefix that a run began with, or chosen on held-out text of the user's or on text that each machine has.

    Args:
        data: not chats, which begin with a token of their own.
    """
    if folder is not None and (folder / FILE).exists():
        kept = Calibration.load(folder).notes["prefix"]
        losses = {text: math.nan if loss is None else loss for text, loss in kept["losses"].items()}
        return Prefix(**{**kept, "losses": losses})
    if isinstance(data, Corpus):
        texts = torch.stack([one["input_ids"][:LENGTH] for one in spread(data.validation, TEXTS)])
    else:
        texts = sample_text(tokenizer, min(given(options.context) - 1, LENGTH))
    with _precision(model, options):
        return choose_prefix(model, tokenizer, texts)


def adapting_data(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Corpus | ChatCorpus | None,
    options: FinetuneOptions,
    prefix: int | None,
    folder: Path,
) -> AdaptingData:
    """What the model writes itself, into ``folder``, mixed half and half with the user's ``data``."""
    front = front_tokens(tokenizer)
    users: tuple[InFront, InFront] | None = None
    if data is not None:
        users = InFront(data.train, front), InFront(data.validation, front)
        if not options.texts:
            return AdaptingData(tokenizer, *users, data.key)
    written = write_texts(
        model, tokenizer, folder / TEXTS_FOLDER, prefix=prefix, texts=given(options.texts),
        length=given(options.context) - len(front), seed=options.seed,
    )  # fmt: skip
    held = np.zeros(len(written.tokens), bool)
    held[:: min(HELD_OUT, len(held))] = True
    train, validation = Texts(written.tokens[~held], front), Texts(written.tokens[held], front)
    key = hash_of([written.tokens.tobytes(), "" if data is None else data.key])
    if users is None:
        return AdaptingData(tokenizer, train, validation, key)
    mixture: Any = Mixture([train, users[0]], [1.0, 1.0], options.seed)  # type: ignore[list-item]
    return AdaptingData(tokenizer, mixture, users[1], key)


def calibrated(
    model: PreTrainedModel,
    data: AdaptingData,
    options: FinetuneOptions,
    prefix: Prefix,
    folder: Path,
) -> Calibration:
    """The calibration of a run, made or found.

    Its notes hold the prefix, the steps that the schedule was made for, and what the model was before.
    """
    if (folder / FILE).exists():
        calibration = Calibration.load(folder)
    else:
        sources = data.train.datasets if isinstance(data.train, Mixture) else [data.train]
        examples = [example for source in sources for example in spread(source, CALIBRATED_ON)]
        batches = [pad_conversations(examples[i : i + 4]) for i in range(0, len(examples), 4)]
        try:
            with _precision(model, options):
                steady = None if options.lora else steady_dimensions(model, given(options.context))
                calibration = calibrate(model, Watch(model), batches, prefix.token, steady)
        except ValueError as error:
            raise InputError(f"{options.model} cannot be adapted: {error}") from error
        before: dict[str, int | None] = {"as it was": None}
        if prefix.token is not None:
            before["with its prefix"] = prefix.token
        calibration.notes.update(
            prefix=asdict(prefix),
            steps=options.steps,
            before={name: measure(model, data.validation, token) for name, token in before.items()},
        )
        calibration.save(folder)
    return calibration


def settle(model: PreTrainedModel, calibration: Calibration) -> None:
    """Give the model the calibrated mass, and the biases."""
    config: Any = model.config.get_text_config(decoder=True)
    config.stablemask = {**config.stablemask, "shift": calibration.shifts.tolist()}
    if calibration.keys:
        give_biases(model, calibration)


def distillation(teacher: Any, calibration: Calibration) -> Distillation:
    """What the trainer needs, from what a run keeps."""
    notes = calibration.notes
    return Distillation(teacher, notes["prefix"]["token"], calibration, Schedule(notes["steps"]))


def _precision(model: PreTrainedModel, options: FinetuneOptions) -> Any:
    return torch.autocast(model.device.type, torch.bfloat16, options.dtype == "bfloat16")
