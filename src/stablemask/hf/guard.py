"""What a configuration asks for is what runs: every other way is refused where it is chosen.

Transformers takes the name of an attention on trust. Some families ignore it, and a model whose
configuration asks for StableMask may be told to run something else. Both would be silent. Nor does it save
the name, so a model that was given it says in its configuration what it runs.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.configuration import StableMaskConfig
from ..models.layers import StableMaskAttention
from ..models.modeling import ATTN_IMPLEMENTATION, StableMaskPreTrainedModel
from .settings import model_settings

# The names under which a model runs its mass; `stablemask.vllm` adds the one that vLLM's attention has.
RUNS_STABLEMASK = {ATTN_IMPLEMENTATION, "sdpa"}


def install() -> None:
    """Make every PreTrainedModel check the name of its attention, at its birth and at each change."""
    for name in ("get_correct_attn_implementation", "_check_and_adjust_attn_implementation"):
        wrap_method(PreTrainedModel, name, _choosing)
    wrap_method(PreTrainedModel, "post_init", _checking)
    wrap_method(PreTrainedModel, "set_attn_implementation", _telling)


def wrap_method(cls: type, name: str, wrap: Callable[[Any], Any]) -> None:
    """Put what ``wrap`` makes of a method in its place, once, however often it is asked for."""
    method = inspect.getattr_static(cls, name)
    function = getattr(method, "__func__", method)
    if hasattr(function, "_minds_stablemask"):
        return
    wrapped: Any = functools.wraps(function)(wrap(function))
    wrapped._minds_stablemask = True
    setattr(cls, name, type(method)(wrapped) if isinstance(method, classmethod) else wrapped)


def _checking(post_init: Any) -> Any:
    def check(self: PreTrainedModel) -> None:
        post_init(self)
        if getattr(self.config, "stablemask", None) is not None:
            check_layers(self, self.config, self.config.stablemask)
        elif self.config._attn_implementation == ATTN_IMPLEMENTATION and self.can_generate():
            check_layers(self, self.config.get_text_config(decoder=True), {})
        write_settings(self)

    return check


def _telling(set_attn_implementation: Any) -> Any:
    def tell(self: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        set_attn_implementation(self, *args, **kwargs)
        for model in self.modules():
            if isinstance(model, PreTrainedModel):
                write_settings(model)

    return tell


def _choosing(method: Any) -> Any:
    def choose(self: PreTrainedModel, requested: str | None, *args: Any, **kwargs: Any) -> str:
        return method(self, resolve(self, requested), *args, **kwargs)

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
    if asks and requested not in RUNS_STABLEMASK:
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


def check_layers(
    model: PreTrainedModel, config: PreTrainedConfig, settings: dict[str, Any]
) -> None:
    """Raise ValueError for a built model that would not run what ``config.stablemask`` asks for.

    None of its layers reads it, or those do not tell which of the listed shifts is theirs.
    """
    if not attention_layers(model, config):
        raise ValueError(
            f"StableMask cannot run in {type(model).__name__}: it has no causal attention that reads "
            "this configuration (encoders need is_decoder=True)"
        )
    if isinstance(settings.get("shift"), (list, tuple)):
        numbered_layers(model, config)


def attention_layers(model: nn.Module, config: PreTrainedConfig) -> list[nn.Module]:
    """The modules whose attention reads ``config.stablemask``, in order."""
    if isinstance(config, StableMaskConfig):
        return [layer for layer in model.modules() if isinstance(layer, StableMaskAttention)]
    return [layer for layer in model.modules() if _attends_causally(layer, config)]


def numbered_layers(model: nn.Module, config: PreTrainedConfig) -> dict[int, nn.Module]:
    """The same by the number of their decoder layer.

    Raises:
        ValueError: a module does not tell its number, so no list can say what is its own.
    """
    layers = attention_layers(model, config)
    numbered: dict[Any, nn.Module] = {getattr(layer, "layer_idx", None): layer for layer in layers}
    if len(numbered) != len(layers) or not numbered.keys() <= set(range(config.num_hidden_layers)):
        raise ValueError(
            f"a shift of each layer cannot run in {type(model).__name__}: its attention modules do not tell "
            "which layer they are in (layer_idx); give one number for all"
        )
    return numbered


def write_settings(model: PreTrainedModel) -> None:
    """Where the attention was chosen by its name alone, say so in ``config.stablemask``.

    Not in a model with learned sinks, whose name alone means those, nor in our own decoder, whose
    ``config.attention`` decides.
    """
    config: Any = model.config
    if (
        config._attn_implementation != ATTN_IMPLEMENTATION
        or getattr(config, "stablemask", None) is not None
        or isinstance(model, StableMaskPreTrainedModel)
    ):
        return
    layers = attention_layers(model, config)
    if layers and not any(hasattr(layer, "sinks") for layer in layers):
        config.stablemask = model_settings(config)


def _attends_causally(layer: nn.Module, config: PreTrainedConfig) -> bool:
    if getattr(layer, "config", None) is not config or isinstance(layer, PreTrainedModel):
        return False
    return getattr(layer, "is_causal", "Attention" in type(layer).__name__)
