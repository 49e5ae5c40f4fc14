"""A layer of the decoder: attention with a sink logit per row, and SwiGLU, each behind an RMSNorm.

Shapes: (batch, length, hidden) outside attention, (batch, heads, length, head_dim) inside.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

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
from .presets import FRONT_TOKENS
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


class Terms(NamedTuple):
    """What attention is made of; under tensor parallelism of the heads of this rank.

    Attributes:
        query, key, value: (batch, heads or kv_heads, length, head_dim), rotated.
        sink_logits: broadcastable to (batch, heads, length).
        front_value: (batch, heads, 1, head_dim), of a token in front of the sequence, whose score is the
            sink logit: value is less it, so that what attends to the front token gets it added.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    sink_logits: Tensor
    front_value: Tensor | None = None


class StableMaskAttention(nn.Module):
    """Grouped-query attention with a sink logit per row.

    To study its attention maps, hook its inputs and rebuild the scores from :meth:`terms`.
    """

    sinks: nn.Parameter | None
    sink_keys: nn.Parameter | None
    head_gate: nn.Linear | None
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
        if config.attention == "key-sink":
            self.sink_keys = nn.Parameter(torch.empty(config.num_attention_heads, config.head_dim))
        else:
            self.register_parameter("sink_keys", None)
        self.head_gate = None
        if config.attention == "head-gate":
            self.head_gate = nn.Linear(config.hidden_size, config.num_attention_heads, bias=False)
        self.has_front = config.attention in FRONT_TOKENS
        self.register_parameter(SHIFT_PARAMETER, None)  # of `stablemask.hf.train_shifts`

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

    def terms(
        self,
        hidden_states: Tensor,
        sink_logits: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> Terms:
        """What attention is made of, given the sink logits that follow from positions.

        Args:
            hidden_states: (batch, length, hidden), the token in front among them where there is one.
        """
        query, key, value = self.project(hidden_states, rotary)
        if query.shape[1] != self.num_groups * key.shape[1]:
            raise ValueError(
                "tensor parallelism must shard q_proj, k_proj and v_proj alike, got "
                f"{query.shape[1]} query heads and {key.shape[1]} key heads on a rank"
            )
        if self.sinks is not None:
            sink_logits = self.sinks[:, None]
        assert sink_logits is not None
        if self.stablemask_shift is not None:
            sink_logits = sink_logits + self.stablemask_shift[:, None]
        sink_logits = self._of_rank("sink_logits", sink_logits, query)
        if self.sink_keys is not None:
            sink_keys = self._of_rank("query", self.sink_keys[:, None], query)
            if rotary is not None:  # as each row is: no row is nearer to it
                sink_keys = rotate(sink_keys, *rotary)
            return Terms(query, key, value, sink_logits + self._scores(query, sink_keys))
        if not self.has_front:
            return Terms(query, key, value, sink_logits)
        query, (front_key, key), (front_value, value) = (
            query[:, :, 1:],
            *((states[:, :, :1], states[:, :, 1:]) for states in (key, value)),
        )
        # Its weight is 1 less those of all others, so that
        #     sum_j p_j v_j + (1 - sum_j p_j) v_front  =  sum_j p_j (v_j - v_front) + v_front.
        front_key, of_heads = (
            states.repeat_interleave(self.num_groups, 1) for states in (front_key, front_value)
        )
        sink_logits = sink_logits + self._scores(query, front_key)
        return Terms(query, key, value - front_value, sink_logits, of_heads)

    def _scores(self, query: Tensor, key: Tensor) -> Tensor:
        """Of each row with one key of its head, (batch, heads, length), in float32 or better."""
        dtype = torch.promote_types(query.dtype, torch.float32)
        return (query.to(dtype) * key.to(dtype)).sum(-1) * self.head_dim**-0.5

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
            hidden_states: (batch, length, hidden), the token in front among them where there is one.
            sink_logits: broadcastable to (batch, heads, length); None where the layer has its own.
            rotary: cos and sin from :func:`rotary_angles`.
            attn_mask, alibi_slopes: as in :func:`stablemask.sink_attention`.
            cache: the one to which this layer's keys and values are added.
            sequence_group: the processes that hold the other parts of these sequences.
        """
        query, key, value, sink_logits, front_value = self.terms(hidden_states, sink_logits, rotary)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        alibi_slopes = self._of_rank("alibi_slopes", alibi_slopes, query)
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
                attn_mask=self._of_rank("attn_mask", attn_mask, query),
                alibi_slopes=alibi_slopes,
                dropout_p=self.attention_dropout if self.training else 0.0,
            )
        if front_value is not None:  # which the front token itself sees alone
            output = torch.cat((front_value, output + front_value), 2)
        if self.head_gate is not None:
            gates = self.head_gate(hidden_states).sigmoid().transpose(1, 2)
            output = output * self._of_rank("sink_logits", gates, query)[..., None]
        return self.o_proj(output.transpose(1, 2).flatten(2))

    def _of_rank(self, name: str, argument: Any, query: Tensor) -> Any:
        """What of all heads' is for those of this rank's query, in tensor parallelism."""
        if query.shape[1] == self.num_heads:
            return argument
        return self._head_shards(query).local(name, argument)

    def _head_shards(self, query: Tensor) -> "Shards":
        """Which heads are this rank's, so that each meets its own gamma, slope and sink."""
        from ..distributed.tensor_parallel import head_shards

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
