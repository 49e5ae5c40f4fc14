"""Our own decoder out of vLLM's parts: Llama's, but for its positions and for what takes of a row's attention.

It computes what :mod:`stablemask.models.modeling` does, and loads the same weights.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_pp_group,
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.model_executor.utils import set_weight_attrs

from ..models.positions import check_length, sinusoidal_encoding
from ..models.settings import LEARNED
from ..pseudo import head_decay_rates


class StableMaskAttention(nn.Module):
    """Llama's, with any of our positions, and sinks that are constant; a mass is the backend's part."""

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        max_position_embeddings: int,
        quant_config: Any = None,
        cache_config: Any = None,
        prefix: str = "",
        **_: Any,
    ):
        super().__init__()
        ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
        head_dim = config.head_dim
        heads, kv_heads = num_heads // ranks, max(1, num_kv_heads // ranks)
        own = slice(rank * heads, (rank + 1) * heads)
        self.sizes = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]
        self.qkv_proj = QKVParallelLinear(
            hidden_size,
            head_dim,
            num_heads,
            num_kv_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            num_heads * head_dim,
            hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.rotary_emb = None
        if config.position_encoding == "rope":
            self.rotary_emb = get_rope(
                head_dim,
                max_position=max_position_embeddings,
                rope_parameters=config.rope_parameters,
            )
        given: dict[str, Any] = {}
        if config.position_encoding == "alibi":
            given["alibi_slopes"] = head_decay_rates(num_heads)[own].tolist()
        if config.attention == "softmax1":
            given["sinks"] = torch.zeros(heads)
        elif config.attention == "learned-sink":
            self.sinks = nn.Parameter(torch.empty(heads), requires_grad=False)
            set_weight_attrs(
                self.sinks, {"weight_loader": lambda to, whole: to.data.copy_(whole[own])}
            )
            given["sinks"] = self.sinks
        self.attn = Attention(
            heads,
            head_dim,
            head_dim**-0.5,
            num_kv_heads=kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
            **given,
        )

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """(T, hidden) to the same."""
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split(self.sizes, dim=-1)
        if self.rotary_emb is not None:
            query, key = self.rotary_emb(positions, query, key)
        out, _ = self.o_proj(self.attn(query, key, value))
        return out


class StableMaskDecoderLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None):
        super().__init__(vllm_config, prefix, config, attn_layer_type=StableMaskAttention)


class StableMaskModel(LlamaModel):
    """The decoder without its head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = None):
        super().__init__(
            vllm_config=vllm_config, prefix=prefix, layer_type=layer_type or StableMaskDecoderLayer
        )
        config = self.config
        if config.position_encoding == "learned":
            check_length(vllm_config.model_config.max_model_len, config.max_position_embeddings)
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if (config.stablemask or {}).get("gamma") == LEARNED:
            shape = (config.num_hidden_layers, config.num_attention_heads)
            self.log_gamma = nn.Parameter(torch.empty(shape), requires_grad=False)
            for layer in self.layers:
                if isinstance(layer, StableMaskDecoderLayer):
                    layer.self_attn.attn.impl.log_gamma = self.log_gamma

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Token ids or embeddings, and positions, (T,)."""
        kind = self.config.position_encoding
        if kind in ("learned", "sinusoidal") and get_pp_group().is_first_rank:
            states = self.embed_input_ids(input_ids) if inputs_embeds is None else inputs_embeds
            if kind == "learned":
                inputs_embeds = states + self.embed_positions(positions)
            else:
                encoding = sinusoidal_encoding(positions, self.config.hidden_size)
                scale = self.config.hidden_size**0.5
                inputs_embeds = states * scale + encoding.to(states.dtype)
        return super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)


class StableMaskForCausalLM(LlamaForCausalLM):
    """The decoder with a language-model head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = None):
        vllm_config.model_config.hf_config.hidden_act = "silu"  # which Llama's layers ask for
        super().__init__(
            vllm_config=vllm_config, prefix=prefix, layer_type=layer_type or StableMaskDecoderLayer
        )

    def _init_model(
        self, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = None
    ) -> StableMaskModel:
        return StableMaskModel(vllm_config=vllm_config, prefix=prefix, layer_type=layer_type)
