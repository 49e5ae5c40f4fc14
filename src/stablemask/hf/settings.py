"""``config.stablemask`` of a Transformers model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig

from ..models.configuration import StableMaskConfig
from ..models.settings import complete_settings


def model_settings(config: PreTrainedConfig, given: dict[str, Any] | None = None) -> dict[str, Any]:
    """The settings of a model, checked and with their defaults.

    Args:
        config: of a text model.
        given: settings in place of ``config.stablemask``.

    Raises:
        ValueError: see :func:`~stablemask.models.settings.complete_settings`.
    """
    if given is None:
        given = getattr(config, "stablemask", None)
    # Some configurations have none (Mamba), some one a layer.
    num_heads = getattr(config, "num_attention_heads", None)
    if not isinstance(num_heads, int):
        raise ValueError(
            f"StableMask needs one num_attention_heads, which {type(config).__name__} does not name"
        )
    num_layers = getattr(config, "num_hidden_layers", None)
    return complete_settings(
        given,
        num_heads,
        context_of(config),
        num_layers if isinstance(num_layers, int) else None,
        own_decoder=isinstance(config, StableMaskConfig),
    )


@contextmanager
def changed_settings(config: Any, **changes: Any) -> Iterator[None]:
    """``config.stablemask``, which there is, with other values for a while."""
    given = config.stablemask
    config.stablemask = {**given, **changes}
    try:
        yield
    finally:
        config.stablemask = given


def context_of(config: PreTrainedConfig) -> int | None:
    """The context a model was made for, whose inverse is the default gamma; None where not named."""
    for name in ("max_position_embeddings", "max_seq_len", "seq_length"):
        context = getattr(config, name, None)
        if isinstance(context, int):
            return context
    return None
