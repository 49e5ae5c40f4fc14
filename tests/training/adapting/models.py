"""Tiny softmax models of several families, made StableMask models without a mass."""

from typing import Any

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from stablemask.training.adapting.adapt import make_stablemask
from stablemask.training.finetune_options import FinetuneOptions

from ...models.tiny import tiny_model

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PREFIX = 5


def llama(**settings: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**(SIZES | settings))).eval()


def windowed() -> Any:
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=6)).eval()


def cohere() -> Any:
    return CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)).eval()


def ours(position: str = "rope") -> Any:
    return tiny_model(attention="softmax", position_encoding=position)


MODELS = {
    "llama": llama, "windowed": windowed, "ours": ours, "alibi": lambda: ours("alibi"),
}  # fmt: skip


def options(**changes: Any) -> FinetuneOptions:
    settings = {"model": "m", "out": "o", "adapt": True, "context": 12, "dtype": "float32"}
    return FinetuneOptions(**(settings | changes))


def softmax_with_settings(name: str, dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """A model that attends by softmax still, for its mass is next to nothing."""
    model = MODELS[name]().to(dtype)
    make_stablemask(model, options(**settings))
    return model


def texts(rows: int, length: int) -> torch.Tensor:
    """The first begins with the prefix itself."""
    ids = torch.randint(6, 61, (rows, length))
    ids[0, 0] = PREFIX
    return ids
