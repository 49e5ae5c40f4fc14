"""Tiny random models of Transformers' own families, their attention far from uniform."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..hf import families as hf_families

SIZES: dict[str, Any] = {**hf_families.SIZES, "num_hidden_layers": 3}
MORE: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {"head_dim": 8},
    "Mistral": {"sliding_window": 5},
    "GPTNeoX": {},
    "GPT2": {"n_positions": 64},
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "Gemma2": {"head_dim": 8, "sliding_window": 5, "attn_logit_softcapping": 2.0},
    "Gemma3": {"head_dim": 8, "sliding_window": 5, "sliding_window_pattern": 2},
    "GptOss": {
        "head_dim": 8,
        "sliding_window": 5,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "experts_implementation": "eager",  # the grouped product has no float64
    },
    "Bloom": {},
    "Falcon": {},
}
CAPTURED = tuple(name for name in MORE if name not in ("Bloom", "Falcon"))


def tiny_transformer(
    family: str, dtype: torch.dtype = torch.float32, attention: str | None = None, **overrides: Any
) -> PreTrainedModel:
    """The same weights for the same arguments, whatever the dtype and the attention."""
    torch.manual_seed(0)
    name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    config = getattr(transformers, name)(**{**SIZES, **MORE[family], **overrides})
    model = getattr(transformers, f"{family}{_HEADS.get(family, 'ForCausalLM')}")
    built = model._from_config(config, attn_implementation=attention)
    return built.to(dtype).eval()


_HEADS = {"GPT2": "LMHeadModel"}
