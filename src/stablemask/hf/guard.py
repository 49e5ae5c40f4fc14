"""What a configuration asks for is what runs: every other way is refused where it is chosen.

Transformers takes the name of an attention on trust. Some families ignore it, and a model whose
configuration asks for StableMask may be told to run something else. Both would be silent.
"""

import functools
from typing import Any

from transformers import PreTrainedModel

from ..models.modeling import ATTN_IMPLEMENTATION, StableMaskPreTrainedModel
from .settings import model_settings


def install() -> None:
    """Make every PreTrainedModel check the name of its attention, at its birth and at each change."""
    for name in ("get_correct_attn_implementation", "_check_and_adjust_attn_implementation"):
        method = getattr(PreTrainedModel, name)
        if not hasattr(method, "_guards_stablemask"):
            setattr(PreTrainedModel, name, _guarded(method))


def _guarded(method: Any) -> Any:
    @functools.wraps(method)
    def choose(self: PreTrainedModel, requested: str | None, *args: Any, **kwargs: Any) -> str:
        return method(self, resolve(self, requested), *args, **kwargs)

    choose._guards_stablemask = True  # type: ignore[attr-defined]
    return choose


def resolve(model: PreTrainedModel, requested: str | None) -> str | None:
    """The attention that ``model`` must run when ``requested`` is asked for.

    Raises:
        ValueError: ``config.stablemask`` asks for StableMask and the name for something else, a setting
            is out of its range, or the family cannot run it.
    """
    asks = getattr(model.config, "stablemask", None) is not None
    if asks and requested is None:
        requested = ATTN_IMPLEMENTATION
    if requested == ATTN_IMPLEMENTATION or asks:
        check_family(type(model))
    if asks:
        model_settings(model.config)
    if asks and requested not in (ATTN_IMPLEMENTATION, "sdpa"):
        raise ValueError(
            f"config.stablemask asks for StableMask, and attn_implementation={requested!r} would not "
            "run it: leave the name out, or set config.stablemask to None"
        )
    return requested


def check_family(model_class: type[PreTrainedModel]) -> None:
    """Raise ValueError for a model whose layers do not call Transformers' attention interface."""
    if issubclass(model_class, StableMaskPreTrainedModel):
        return
    # A user's subclass is as able as the class of the library behind it.
    library_class: Any = next(
        (
            base
            for base in model_class.__mro__
            if base.__module__.startswith("transformers.models.")
        ),
        model_class,
    )
    if not library_class._can_set_attn_implementation():
        raise ValueError(
            f"StableMask cannot run in {model_class.__name__}: its layers compute their attention "
            "themselves and do not call Transformers' attention interface"
        )
