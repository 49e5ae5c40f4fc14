"""A layer of the decoder: attention with a sink logit per row, and SwiGLU, each behind an RMSNorm.

Shapes: (batch, length, hidden) outside attention, (batch, heads, length, head_dim) inside.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from ..attention import sink_attention
from .cache import CACHE
from .configuration import StableMaskConfig
from .norm import RMSNorm
from .positions import Rotary, rotate
from .settings import SHIFT_PARAMETER

if TYPE_CHECKING:
    from ..distributed.tensor_parallel import Shards


class StableMaskMLP(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: StableMaskConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class StableMaskAttention(nn.Module):
    """Grouped-query attention with a sink logit per row.

    To study its attention maps, hook its inputs and rebuild the scores from :meth:`project`.
    """

    sinks: nn.Parameter | None
    stablemask_shift: nn.Parameter | None
    stablemask_attention: Callable[..., Tensor] | None = None  # see `settings.WATCHED`

    def __init__(self, config: StableMaskConfig, layer_idx: int):
        super().__init__()
        assert config.head_dim is not None
        assert config.num_key_value_heads is not None
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.num_groups = config.num_attention_heads // config.num_key_value_heads
        self.head_dim = config.head_dim
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.query_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.key_value_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.key_value_width, bias=False)
        self.o_proj = nn.Linear(config.query_width, config.hidden_size, bias=False)
        if config.attention == "learned-sink":
            self.sinks = nn.Parameter(torch.empty(config.num_attention_heads))
        else:
            self.register_parameter("sinks", None)
        self.register_parameter(SHIFT_PARAMETER, None)  # of `stablemask.hf.train_shifts`

    def sink(self, sink_logits: Tensor | None) -> Tensor:
        """The sink logits of this layer, given those that follow from positions."""
        if self.sinks is not None:
            return self.sinks[:, None]
        assert sink_logits is not None
        if self.stablemask_shift is not None:
            return sink_logits + self.stablemask_shift[:, None]
        return sink_logits

    def project(
        self, hidden_states: Tensor, rotary: Rotary | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, (batch, heads or kv_heads, length, head_dim), rotated.

        Under tensor parallelism the heads are those of this rank.
        """
        query = self._split_heads(self.q_proj(hidden_states))
        key = self._split_heads(self.k_proj(hidden_states))
        value = self._split_heads(self.v_proj(hidden_states))
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        return query, key, value

    def _split_heads(self, states: Tensor) -> Tensor:
        if states.shape[-1] % self.head_dim:
            raise ValueError(
                "the ranks of tensor parallelism must divide num_attention_heads and "
                f"num_key_value_heads: one has {states.shape[-1]} columns, and a head {self.head_dim}"
            )
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        sink_logits: Tensor | None = None,
        rotary: Rotary | None = None,
        attn_mask: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        cache: Cache | None = None,
        sequence_group: ProcessGroup | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            hidden_states: (batch, length, hidden).
            sink_logits: broadcastable to (batch, heads, length); None where the layer has its own.
            rotary: cos and sin from :func:`rotary_angles`.
            attn_mask, alibi_slopes: as in :func:`stablemask.sink_attention`.
            cache: the one to which this layer's keys and values are added.
            sequence_group: the processes that hold the other parts of these sequences.
        """
        query, key, value = self.project(hidden_states, rotary)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        sink_logits = self.sink(sink_logits)
        if query.shape[1] != self.num_heads:
            shards = self._head_shards(query, key)
            sink_logits = shards.local("sink_logits", sink_logits)
            alibi_slopes = shards.local("alibi_slopes", alibi_slopes)
            attn_mask = shards.local("attn_mask", attn_mask)
        if sequence_group is not None:
            from ..distributed import context_parallel_attention

            output = context_parallel_attention(
                query, key, value, sink_logits, alibi_slopes=alibi_slopes, group=sequence_group
            )
        else:
            output = (self.stablemask_attention or sink_attention)(
                query,
                key,
                value,
                sink_logits,
                attn_mask=attn_mask,
                alibi_slopes=alibi_slopes,
                dropout_p=self.attention_dropout if self.training else 0.0,
            )
        return self.o_proj(output.transpose(1, 2).flatten(2))

    def _head_shards(self, query: Tensor, key: Tensor) -> "Shards":
        """Which heads are this rank's, so that each meets its own gamma, slope and sink."""
        from ..distributed.tensor_parallel import head_shards

        if query.shape[1] != self.num_groups * key.shape[1]:
            raise ValueError(
                "tensor parallelism must shard q_proj, k_proj and v_proj alike, got "
                f"{query.shape[1]} query heads and {key.shape[1]} key heads on a rank"
            )
        return head_shards(self.q_proj, self.num_heads, query.shape[1])


class StableMaskDecoderLayer(GradientCheckpointingLayer):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``."""

    def __init__(self, config: StableMaskConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = StableMaskAttention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = StableMaskMLP(config)

    def forward(
        self, hidden_states: Tensor, sink_logits: Tensor | None = None, **attention_inputs: Any
    ) -> Tensor:
        inputs = {"cache": attention_inputs.pop(CACHE, None), "sink_logits": sink_logits}
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(normed, **inputs, **attention_inputs)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
