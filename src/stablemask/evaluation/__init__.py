"""What a trained model does: `perplexity.py` by length, `sinks.py` where its attention goes."""

from .perplexity import PerplexityResult, perplexity
from .sinks import (
    AttentionMaps,
    IdenticalTokens,
    attention_maps,
    first_token_attention,
    identical_token_spread,
    real_share,
)

__all__ = [
    "AttentionMaps",
    "IdenticalTokens",
    "PerplexityResult",
    "attention_maps",
    "first_token_attention",
    "identical_token_spread",
    "perplexity",
    "real_share",
]
