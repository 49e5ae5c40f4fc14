"""Our decoder, a Transformers model: read ``configuration.py`` first, then ``modeling.py``."""

from .configuration import StableMaskConfig
from .cost import Flops, count_parameters, flops_per_token, training_memory
from .modeling import StableMaskForCausalLM, StableMaskModel
from .presets import PRESETS, preset_config

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
