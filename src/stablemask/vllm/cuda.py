"""StableMask in vLLM's FlashAttention for NVIDIA GPUs, which stays as it is for every other model.

vLLM's kernels (FlashAttention 2, 3 and 4) compute the logsumexp of each row in any case, and return it when
asked. One launch more a layer takes the mass's share from their output, see :mod:`.kernels`. Nothing of it
depends on the host, so CUDA graphs hold wherever they hold for the kernel itself.

vLLM's other backends for CUDA give no logsumexp of a whole step (Triton's none, FlashInfer's not from the
kernels of TensorRT-LLM that it prefers), and are refused by name.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends import flash_attn as stock

from .kernels import take_share
from .mass import AttentionWithMass


class StableMaskFlashBackend(stock.FlashAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[stock.FlashAttentionImpl]:
        return StableMaskFlashImpl

    @staticmethod
    def get_builder_cls() -> type[stock.FlashAttentionMetadataBuilder]:
        return StableMaskFlashMetadataBuilder


class StableMaskFlashMetadataBuilder(stock.FlashAttentionMetadataBuilder):
    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """As vLLM says of its version for the card, unless a layer runs version 2 there.

        Version 2 has another kernel for one row a request, which no graph of a mixed batch can hold.
        """
        support = super().get_cudagraph_support(vllm_config, kv_cache_spec)
        layers = get_layers_from_vllm_config(vllm_config, Attention).values()
        if support is AttentionCGSupport.ALWAYS and any(
            getattr(layer.impl, "vllm_flash_attn_version", None) == 2 for layer in layers
        ):
            return AttentionCGSupport.UNIFORM_BATCH
        return support


class StableMaskFlashImpl(AttentionWithMass, stock.FlashAttentionImpl):
    """The attention of a layer. T rows of a step, H query heads and KH key heads of this rank, D head_dim."""

    def prepare(self, layer: Any, *args: Any) -> None:
        super().prepare(layer, *args)
        if self.fa4_hd256:  # a kernel of its own, of which vLLM never asks a logsumexp
            self.vllm_flash_attn_version = 2

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        before = self.mass
        super().process_weights_after_loading(act_dtype)
        if before is not None and self.mass is not None:
            # Weights loaded again, which graphs read at the places where the first ones were.
            for old, new in zip(before, self.mass, strict=True):
                old.copy_(new)
            self.mass = before

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Attend; query and output (T, H, D), cache (pages, KH, block, 2 D)."""
        scales = output_scale, output_block_scale
        if self.make_mass is None or attn_metadata is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, *scales
            )
        metadata, rows = attn_metadata, attn_metadata.num_actual_tokens
        if metadata.causal is not True or metadata.mm_prefix_query_range_tensor is not None:
            raise ValueError("StableMask is causal, and this batch is not")
        if scales != (None, None):
            raise NotImplementedError("StableMask writes no quantized output")
        assert self.mass is not None, "the weights are not loaded"
        keys, values = (
            stock.canonicalize_singleton_dim_strides(half)
            for half in kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        )
        splits, version = metadata.max_num_splits, self.vllm_flash_attn_version
        window = list(self.sliding_window)
        if self.alibi_slopes is not None and window[0] < 0:
            # Told of no window it adds slope * key for -slope * distance: the same weights, and another logsumexp.
            window = [metadata.max_seq_len - 1, 0]
        out = output[:rows]
        _, lse = stock.flash_attn_varlen_func(
            q=query[:rows],
            k=keys,
            v=values,
            out=out,
            cu_seqlens_q=metadata.query_start_loc,
            max_seqlen_q=metadata.max_query_len,
            seqused_k=metadata.seq_lens,
            max_seqlen_k=metadata.max_seq_len,
            softmax_scale=self.scale,
            causal=True,
            alibi_slopes=self.alibi_slopes,
            window_size=window,
            block_table=metadata.block_table,
            scheduler_metadata=metadata.scheduler_metadata if version == 3 else None,
            num_splits=min(splits, 1) if version == 2 else splits,
            fa_version=version,
            return_softmax_lse=True,
        )
        take_share(out, lse, self.mass, metadata.query_start_loc, metadata.seq_lens)
        return output
