"""Our decoder, a Transformers model: read ``configuration.py`` first, then ``modeling.py``."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .configuration import StableMaskConfig, preset_config
    from .cost import Flops, count_parameters, flops_per_token, training_memory
    from .modeling import StableMaskForCausalLM, StableMaskModel
    from .presets import PRESETS

_MODULES = {
    "configuration": ("StableMaskConfig", "preset_config"),
    "cost": ("Flops", "count_parameters", "flops_per_token", "training_memory"),
    "modeling": ("StableMaskForCausalLM", "StableMaskModel"),
    "presets": ("PRESETS",),
}
__all__ = [
    "PRESETS",
    "Flops",
    "StableMaskConfig",
    "StableMaskForCausalLM",
    "StableMaskModel",
    "count_parameters",
    "flops_per_token",
    "preset_config",
    "training_memory",
]


def __getattr__(name: str) -> Any:
    # Transformers is loaded with the first name that needs it: the command line reads `presets` alone.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
