"""As much of vLLM as ``stablemask.vllm.cuda`` extends, where vLLM is not installed."""

import enum
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace


class AttentionCGSupport(enum.Enum):
    ALWAYS = 3
    UNIFORM_BATCH = 2


class FlashAttentionBackend:
    pass


class FlashAttentionMetadataBuilder:
    _cudagraph_support = AttentionCGSupport.ALWAYS

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec):
        return cls._cudagraph_support


class FlashAttentionImpl:
    fa4_hd256 = False

    def __init__(
        self,
        num_heads,
        head_size,
        scale,
        num_kv_heads,
        alibi_slopes,
        sliding_window,
        kv_cache_dtype,
    ):
        import torch

        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_size, self.scale = head_size, scale
        self.alibi_slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes)
        self.sliding_window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
        self.vllm_flash_attn_version, self.sinks = None, None

    def process_weights_after_loading(self, act_dtype):
        pass

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *scales):
        return "stock"


PARTS = {
    "vllm": {},
    "vllm.config": {"get_layers_from_vllm_config": lambda config, kind: config.layers},
    "vllm.model_executor": {},
    "vllm.model_executor.layers": {},
    "vllm.model_executor.layers.attention": {"Attention": object},
    "vllm.platforms": {"current_platform": SimpleNamespace(device_type="cpu")},
    "vllm.v1": {},
    "vllm.v1.attention": {},
    "vllm.v1.attention.backend": {"AttentionCGSupport": AttentionCGSupport},
    "vllm.v1.attention.backends": {},
    "vllm.v1.attention.backends.registry": {
        "AttentionBackendEnum": SimpleNamespace(FLASH_ATTN="FLASH_ATTN", FLASHINFER="FLASHINFER"),
        "register_backend": None,
    },
    "vllm.v1.attention.backends.flash_attn": {
        "FlashAttentionBackend": FlashAttentionBackend,
        "FlashAttentionImpl": FlashAttentionImpl,
        "FlashAttentionMetadataBuilder": FlashAttentionMetadataBuilder,
        "canonicalize_singleton_dim_strides": lambda tensor: tensor,
    },
}


def install(monkeypatch):
    """Until the test ends."""
    for name, content in PARTS.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
        above, _, last = name.rpartition(".")
        if above:
            setattr(sys.modules[above], last, module)
