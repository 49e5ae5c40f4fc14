"""Models small enough to check exhaustively, with weights large enough that logits differ."""

from typing import Any

import torch

from stablemask.models import StableMaskConfig, StableMaskForCausalLM
from stablemask.models.configuration import ATTENTION_KINDS, POSITION_ENCODINGS

# Kinds that have nothing to do with how positions are told, but for distances.
BY_DISTANCE = ("stablemask-paper", "stablemask-zero", "key-sink", "learned-token", "fixed-token", "head-gate")  # fmt: skip
DESIGNS = [
    (position, kind)
    for position in POSITION_ENCODINGS
    for kind in ATTENTION_KINDS
    if kind not in BY_DISTANCE or position in ("rope", "alibi")
]
# Every encoding and every kind once, where the two have nothing to do with each other.
FEW_DESIGNS = [*((position, "stablemask") for position in POSITION_ENCODINGS)]
FEW_DESIGNS += [("alibi", kind) for kind in ATTENTION_KINDS if kind != "stablemask"]


def tiny_config(**overrides: Any) -> StableMaskConfig:
    settings = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "initializer_range": 0.3,
    }
    return StableMaskConfig(**{**settings, **overrides})


def tiny_model(dtype: torch.dtype = torch.float32, **overrides: Any) -> StableMaskForCausalLM:
    return StableMaskForCausalLM(tiny_config(**overrides)).to(dtype).eval()


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(1, 61, shape)
