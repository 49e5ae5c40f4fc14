"""The bridge to Transformers: importing it registers our model with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ..models import StableMaskConfig, StableMaskForCausalLM, StableMaskModel
from .loading import load_model

AutoConfig.register(StableMaskConfig.model_type, StableMaskConfig, exist_ok=True)
AutoModel.register(StableMaskConfig, StableMaskModel, exist_ok=True)
AutoModelForCausalLM.register(StableMaskConfig, StableMaskForCausalLM, exist_ok=True)

__all__ = ["load_model"]
