"""A shift of log M that is trained: one number per layer and query head, beside the weights.

While a model has them, the parameters stand in place of the ``shift`` of its settings. A model that is saved
meanwhile has them in its settings.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..models.settings import SHIFT_PARAMETER
from .guard import numbered_layers
from .settings import model_settings


def train_shifts(model: nn.Module) -> list[nn.Parameter]:
    """Make the shift of each layer a parameter, from what ``config.stablemask`` has.

    Call it before the model is sharded or compiled, and after PEFT has frozen it.

    Args:
        model: a StableMask model, one of PEFT's around it too.

    Returns:
        The parameters, ``(heads,)`` float32, in the order of layers; in ``model.named_parameters()``
        they are ``...`` + ``models.settings.SHIFT_PARAMETER``.

    Raises:
        ValueError: the model has no StableMask, or its attention modules do not tell their layers.
    """
    config = _config(model)
    rows = read_shifts(model)
    parameters = []
    for number, layer in sorted(numbered_layers(model, config).items()):
        device = next(layer.parameters()).device
        shift = nn.Parameter(torch.tensor(rows[number], dtype=torch.float32, device=device))
        layer.register_parameter(SHIFT_PARAMETER, shift)
        parameters.append(shift)
    return parameters


def read_shifts(model: nn.Module) -> list[list[float]]:
    """The shift in force, by layer and query head: trained, or that of the settings.

    A layer without attention has that of the settings. Where parameters are sharded, every process calls it.

    Raises:
        ValueError: as :func:`train_shifts`.
    """
    config = _config(model)
    shift = model_settings(config).get("shift", 0.0)
    rows = (
        [list(map(float, row)) for row in shift]
        if isinstance(shift, list)
        else [[float(shift)] * config.num_attention_heads for _ in range(config.num_hidden_layers)]
    )
    for number, layer in numbered_layers(model, config).items():
        trained: Tensor | None = getattr(layer, SHIFT_PARAMETER, None)
        if trained is not None:
            whole = trained.full_tensor() if isinstance(trained, DTensor) else trained
            rows[number] = whole.tolist()  # float32 as Python's floats: JSON keeps each bit
    return rows


def keep_shifts(model: nn.Module) -> None:
    """Write the shifts in force into ``config.stablemask``, and end their training.

    What the model computes stays the same to the bit.

    Raises:
        ValueError: as :func:`train_shifts`, or a shift is not finite; the model is then as it was.
    """
    _note(model)
    for layer in numbered_layers(model, _config(model)).values():
        layer.register_parameter(SHIFT_PARAMETER, None)


def note_shifts(model: nn.Module) -> bool:
    """Write shifts that are in training into ``config.stablemask``, for saving; whether there are any.

    Sharded ones are left to the trainer, for all processes gather them together.
    """
    found = (layer._parameters.get(SHIFT_PARAMETER) for layer in model.modules())
    trained = [shift for shift in found if shift is not None]
    if trained and not any(isinstance(shift, DTensor) for shift in trained):
        _note(model)
    return bool(trained)


def _note(model: nn.Module) -> None:
    config = _config(model)
    config.stablemask = model_settings(config, {**config.stablemask, "shift": read_shifts(model)})


def _config(model: nn.Module) -> Any:
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]
    if getattr(config, "stablemask", None) is None:
        raise ValueError(f"{type(model).__name__} runs no StableMask, so it has no shift to train")
    return config
