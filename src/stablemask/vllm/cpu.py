"""StableMask in vLLM's attention for CPUs, which stays as it is for every other model.

With the compiled library (``stablemask build``) our own kernels read and write the cache. Without it vLLM's do,
made exact by heads that are wider than the model's; see :func:`~stablemask.vllm.mass.share_of_wider`. Shapes: T rows
of a step, R requests, H query heads and KH key heads of this rank, D head_dim.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from ..backends import native
from .mass import AttentionWithMass, row_positions, share_of_wider, sink_of_all_rows


class StableMaskCPUBackend(CPUAttentionBackend):
    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return StableMaskCPUImpl


class StableMaskCPUImpl(AttentionWithMass, CPUAttentionBackendImpl):
    """The attention of a layer."""

    def prepare(self, layer: Any, *args: Any) -> None:
        super().prepare(layer, *args)
        self.stock: CPUAttentionBackendImpl | None = None  # of wider heads
        if native.LIBRARY is None:
            self.stock = self._widen(layer)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        **scales: Any,
    ) -> Tensor:
        """Attend; query and output (T, H, D), cache (pages, KH, block, 2 D)."""
        if self.make_mass is None or attn_metadata is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, **scales
            )
        metadata, rows = attn_metadata, attn_metadata.num_actual_tokens
        if metadata.causal is not True:
            raise ValueError("StableMask is causal, and this batch is not")
        assert self.mass is not None, "the weights are not loaded"
        query, out = query[:rows], output[:rows]
        if self.stock is not None:
            wide = query.new_empty(rows, self.num_heads, self.stock.head_size)
            self.stock.forward(layer, self._wider(query), key, value, kv_cache, metadata, wide)
            positions = row_positions(metadata.query_start_loc, metadata.seq_lens, rows)
            out.copy_(share_of_wider(wide, self.head_size, self.mass, positions))
        else:
            torch.ops.stablemask.paged_attention(
                query,
                kv_cache,
                metadata.block_table,
                metadata.query_start_loc,
                metadata.seq_lens,
                *self.mass,
                self.alibi_slopes,
                self.scale,
                max(self.sliding_window, 0),
                out,
            )
        return output

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Put keys and values (T, KH, D) into their slots, (T,)."""
        if self.make_mass is None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        elif self.stock is not None:
            key, value = self._wider(key), self._wider(value, 1.0)
            self.stock.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
        else:
            torch.ops.stablemask.paged_write(key, value, slot_mapping, kv_cache)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        super().process_weights_after_loading(act_dtype)
        if self.mass is not None and self.stock is not None:
            self.stock.sinks = sink_of_all_rows(self.mass, self.num_heads)

    def _widen(self, layer: Any) -> CPUAttentionBackendImpl:
        """vLLM's attention of wider heads, and a cache of them."""
        sizes = StableMaskCPUBackend.get_supported_head_sizes()
        wider = next((size for size in sizes if size > self.head_size), None)
        if wider is None or layer.dtype == torch.float16:  # in which a small share is lost
            raise ValueError(
                f"StableMask needs its compiled library for heads of {self.head_size} {layer.dtype}: "
                "run `stablemask build`"
            )
        spec_of = layer.get_kv_cache_spec
        layer.get_kv_cache_spec = lambda config: replace(
            spec_of(config), head_size=wider, head_size_v=wider
        )
        slopes = None if self.alibi_slopes is None else self.alibi_slopes.tolist()
        window = None if self.sliding_window < 0 else self.sliding_window
        return CPUAttentionBackendImpl(
            self.num_heads,
            wider,
            self.scale,
            self.num_kv_heads,
            slopes,
            window,
            self.kv_cache_dtype,
        )

    def _wider(self, heads: Tensor, more: float = 0.0) -> Tensor:
        """(T, H, D) to (T, H, wider), ``more`` in the first new column and 0 in the rest."""
        assert self.stock is not None
        padded = F.pad(heads, (0, self.stock.head_size - self.head_size))
        padded[..., self.head_size] = more
        return padded
