"""What is asked of the model that a finetuning starts from."""

from typing import Any

from ..hf.loading import load_config


def context_of(model: str) -> int:
    """Tokens of a block, where none are given."""
    return min(getattr(_config_of(model), "max_position_embeddings", None) or 1024, 1024)


def text_part(model: Any) -> tuple[Any, ...]:
    """The modules of a loaded model, PEFT's too, that text reaches: of one that sees pictures not its tower."""
    if model.config.get_text_config(decoder=True) is model.config:
        return (model,)
    return model.get_decoder(), model.get_output_embeddings()


def _config_of(model: str) -> Any:
    return load_config(model).get_text_config(decoder=True)
