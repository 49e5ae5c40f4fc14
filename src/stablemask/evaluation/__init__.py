"""What a trained model does.

`perplexity.py` by length, `attention_maps.py` the attention of any decoder, `sinks.py` what is read off it,
`summary.py` all that tells of a sink in one pass.
"""

from .attention_maps import (
    AttentionMaps,
    LayerAttention,
    attention_maps,
    capture_attention,
    reduce_attention,
)
from .perplexity import PerplexityResult, perplexity, perplexity_of, perplexity_text
from .sinks import (
    IdenticalTokens,
    LayerStatistics,
    first_token_attention,
    identical_token_spread,
    layer_statistics,
    real_share,
)
from .summary import SinkSummary, sink_summary

__all__ = [
    "AttentionMaps",
    "IdenticalTokens",
    "LayerAttention",
    "LayerStatistics",
    "PerplexityResult",
    "SinkSummary",
    "attention_maps",
    "capture_attention",
    "first_token_attention",
    "identical_token_spread",
    "layer_statistics",
    "perplexity",
    "perplexity_of",
    "perplexity_text",
    "real_share",
    "reduce_attention",
    "sink_summary",
]
