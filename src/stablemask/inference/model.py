"""What must be known of a model before it runs: its device, its limits, its mode."""

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InputError
from ..reading import first_line


def choose_device(name: str | None) -> torch.device:
    """The named device, or by default the GPU where there is one and the CPU elsewhere.

    Raises:
        InputError: the device does not exist here.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        number = torch.zeros((), device=name)
        number.item()  # which "meta" does not hold
        return number.device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r} cannot be used here: {first_line(error)}") from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no gradients; afterwards the mode of each module is what it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def position_table_length(model: PreTrainedModel) -> int | None:
    """The longest sequence a learned position table allows, None for a model without one."""
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None)
    if context is None:
        return None
    tokens = model.get_input_embeddings()
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    # OPT's table has two rows more than it has positions.
    has_table = any(table.num_embeddings - context in (0, 2) for table in tables)
    return context if has_table else None


def check_length(model: PreTrainedModel, length: int, what: str) -> None:
    """Raise InputError where ``length`` positions are more than a learned table has."""
    table = position_table_length(model)
    if table is not None and length > table:
        raise InputError(
            f"{what} needs {length} positions, and the model's learned position table has {table}; "
            "shorten it, or use a model with another position encoding"
        )


def check_unicode(text: str, what: str) -> None:
    """Raise InputError where a text has half of a surrogate pair, as a shell makes of other bytes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} is not valid Unicode: {error.reason}") from error


def check_token_ids(model: PreTrainedModel, ids: Tensor | Sequence[int]) -> None:
    """Raise InputError where one of these token ids lies outside the model's vocabulary."""
    rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    # Numbers from outside may be more than a tensor holds.
    lowest, highest = map(int, ids.aminmax()) if isinstance(ids, Tensor) else (min(ids), max(ids))
    if lowest < 0 or highest >= rows:
        raise InputError(
            f"token id {lowest if lowest < 0 else highest} is outside the model's vocabulary of {rows}; "
            "use the tokenizer the model was trained with"
        )


def last_logits(model: PreTrainedModel, rows: int) -> dict[str, int]:
    """What keeps a pass from working out the logits of other than the last rows, for models that take it."""
    takes = inspect.signature(model.forward).parameters
    return {"logits_to_keep": rows} if "logits_to_keep" in takes else {}


def changing_rope(model: PreTrainedModel) -> tuple[str | None, int]:
    """The type of a RoPE whose frequencies depend on the length of the text, and the length up to which they do not."""
    given = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    of_layers = [value for value in given.values() if isinstance(value, dict)]
    for parameters in of_layers or [given]:
        if parameters.get("rope_type") == "longrope":
            return "longrope", parameters["original_max_position_embeddings"]
        if parameters.get("rope_type") == "dynamic":
            return "dynamic", 0
    return None, 0


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of decoder layers, whatever the family calls it.

    Raises:
        InputError: no list of ``num_hidden_layers`` modules.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for module in model.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise InputError(f"{type(model).__name__} has no list of {count} decoder layers")


@contextmanager
def errors_only(*names: str) -> Iterator[None]:
    """Keep loggers from reporting what is not wrong, or what we report."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
