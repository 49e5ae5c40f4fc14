"""What the options of a finetuning follow from: the configuration of the model it starts from."""

from typing import Any

from ..hf.loading import load_config


def context_of(model: str) -> int:
    """Tokens of a block, where none are given."""
    return min(getattr(_config_of(model), "max_position_embeddings", None) or 1024, 1024)


def can_have_biases(model: str) -> bool:
    """Whether its family has a switch for biases of attention."""
    return isinstance(getattr(_config_of(model), "attention_bias", None), bool)


def _config_of(model: str) -> Any:
    return load_config(model).get_text_config(decoder=True)
