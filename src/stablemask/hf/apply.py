"""Turning a loaded model into a StableMask model."""

from typing import Any, TypeVar

from torch import nn

from ..models.modeling import ATTN_IMPLEMENTATION, StableMaskPreTrainedModel
from ..models.settings import SHIFT_PARAMETER, given_settings, named_mass
from .adapters import model_of
from .guard import check_family, check_layers
from .settings import context_of, model_settings

Model = TypeVar("Model", bound=nn.Module)


def apply_stablemask(
    model: Model,
    *,
    kind: str = "stablemask",
    gamma: float | list[float] | str | None = None,
    horizon: int | None = None,
    start: int = 0,
    shift: float | list[list[float]] = 0.0,
    hold: int | str | None = None,
) -> Model:
    """Give a model StableMask, at once; its weights stay as they are.

    The settings are kept in ``config.stablemask`` (that of the text model, where a model has several),
    saved with it, and read at every forward pass.

    Args:
        model: any Transformers decoder whose layers call the attention interface, or ours; one of PEFT's
            around it too.
        kind: ``stablemask``, or the name of settings that those below replace one by one:
            ``stablemask-paper`` is the published form (head slopes, and ``horizon`` the model's context),
            ``stablemask-zero`` has pseudo scores of zero within it.
        gamma, horizon, start, shift, hold: see :func:`~stablemask.models.settings.complete_settings`;
            ``hold="never"`` lets the mass fall for ever, as published.

    Returns:
        ``model``.

    Raises:
        ValueError: a setting is out of its range, the family cannot run StableMask, our decoder was built
            for another attention with parameters of its own, or shifts are in training. The model is then
            as it was.
    """
    decoder = model_of(model)
    if decoder is None:
        raise ValueError(f"model must be a Transformers model, got {type(model).__name__}")
    config: Any = decoder.config.get_text_config(decoder=True)
    check_family(type(decoder))
    given = given_settings(gamma=gamma, horizon=horizon, start=start, shift=shift, hold=hold)
    if kind != "stablemask":
        given = named_mass(kind, context_of(config)) | given
    check_layers(decoder, config, given)
    settings = model_settings(config, given)
    if any(layer._parameters.get(SHIFT_PARAMETER) is not None for layer in decoder.modules()):
        raise ValueError("shifts of the model are in training: call keep_shifts(model) first")
    if isinstance(decoder, StableMaskPreTrainedModel):
        ours: Any = decoder.base_model
        ours.check_parts("stablemask", settings)
        config.attention = "stablemask"
    config.stablemask = settings
    decoder.set_attn_implementation(ATTN_IMPLEMENTATION)
    return model
