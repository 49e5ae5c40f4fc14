"""What is asked of the model that a finetuning starts from."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ..hf.guard import attention_layers
from ..hf.loading import load_config
from .adapting.biases import normalises


def context_of(model: str) -> int:
    """Tokens of a block, where none are given."""
    return min(getattr(_config_of(model), "max_position_embeddings", None) or 1024, 1024)


def can_have_biases(model: str) -> bool:
    """Whether its family has a switch for biases of attention."""
    return isinstance(getattr(_config_of(model), "attention_bias", None), bool)


def normalises_keys(model: str) -> bool:
    """Whether its attention does so; built without weights, for no configuration tells."""
    config = load_config(model)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    layers = attention_layers(built, config.get_text_config(decoder=True))
    return any(map(normalises, layers))


def text_part(model: Any) -> tuple[Any, ...]:
    """The modules of a loaded model, PEFT's too, that text reaches: of one that sees pictures not its tower."""
    if model.config.get_text_config(decoder=True) is model.config:
        return (model,)
    return model.get_decoder(), model.get_output_embeddings()


def _config_of(model: str) -> Any:
    return load_config(model).get_text_config(decoder=True)
