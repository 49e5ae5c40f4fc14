"""No model that asks for StableMask is served without it.

A model passes two places before a request is answered: the platform's check of the whole configuration, and
the making of each attention layer. Both are wrapped here. The first refuses what the configuration tells, the
second a layer whose attention would not run the mass. So is the loading of an adapter, which may have been trained
with another mass than the model runs.
"""

import sys
from collections.abc import Callable
from typing import Any

from ..versions import release

# Releases of vLLM that this was tested with, or read against; others are told of in one line.
TESTED = ("0.32", "0.33")
WITHOUT_DRAFT_MODEL = ("ngram", "ngram_gpu", "suffix")  # ways of speculation
SERVED = ("stablemask", "softmax", "softmax1", "learned-sink")  # attention of our decoder
CONSTANT_SINKS = ("softmax1", "learned-sink")  # of it, what vLLM's own kernels compute


def install() -> None:
    """Put the checks in their places, once in a process."""
    import vllm
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.model_executor.layers.attention import Attention, MLAAttention
    from vllm.platforms import current_platform

    import stablemask.hf.guard  # and, by the package, our model type

    # The name by which vLLM has Transformers' layers call its attention, which is watched here.
    stablemask.hf.guard.RUNS_STABLEMASK.add("vllm")
    _tell_untested(vllm.__version__)
    _wrap(type(current_platform), "check_and_update_config", _checking)
    for layer in (Attention, MLAAttention):
        _wrap(layer, "__init__", _watching)
    _wrap(WorkerLoRAManager, "__init__", _knowing)
    _wrap(WorkerLoRAManager, "_load_adapter", _loading)


def register_models() -> None:
    """Our own decoder."""
    from vllm.model_executor.models import ModelRegistry

    ModelRegistry.register_model(
        "StableMaskForCausalLM", f"{__package__}.model:StableMaskForCausalLM"
    )


def register_backends() -> None:
    """Ours in the place of vLLM's, which they extend, and are for every other model.

    Each backend's attention is an :class:`~stablemask.vllm.mass.AttentionWithMass`; one without it is refused
    by name.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__package__}.cpu.StableMaskCPUBackend")
    elif current_platform.is_cuda():
        register_backend(
            AttentionBackendEnum.FLASH_ATTN, f"{__package__}.cuda.StableMaskFlashBackend"
        )


def choose_backend(vllm_config: Any) -> None:
    """On CUDA that of ours, where vLLM is left the choice: on some cards it prefers one that runs no mass."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    attention = vllm_config.attention_config
    if current_platform.is_cuda() and attention.backend is None:
        attention.backend = AttentionBackendEnum.FLASH_ATTN


def text_config(model_config: Any) -> Any:
    """Transformers' configuration of a model's text part, None where there is no model."""
    return None if model_config is None else model_config.hf_text_config


def asks(model_config: Any) -> bool:
    """Whether a model has a mass."""
    return getattr(text_config(model_config), "stablemask", None) is not None


def check(vllm_config: Any) -> None:
    """Refuse in one line what would compute something else, before anything is loaded.

    Raises:
        ValueError: a setting is unknown or out of its range, or StableMask does not run with the rest.
    """
    from ..hf.settings import model_settings
    from ..models import StableMaskConfig

    model = vllm_config.model_config
    reason = _draft_reason(model, vllm_config.speculative_config)
    config = text_config(model)
    if isinstance(config, StableMaskConfig):
        reason = _decoder_reason(config) or reason
    if asks(model):
        model_settings(text_config(model))
        reason = reason or next((why for found, why in _refused(vllm_config) if found), None)
    if reason is not None:
        raise ValueError(f"StableMask does not run under vLLM with {reason}")


def _decoder_reason(config: Any) -> str | None:
    """Why our own decoder is refused."""
    if config.attention not in SERVED:
        return f"attention={config.attention!r}, which our decoder runs under Transformers alone"
    if config.attention in CONSTANT_SINKS and config.position_encoding == "alibi":
        from vllm.platforms import current_platform

        # By a key's place in them, the scores of a prompt's rows are all too high, and the sink is not.
        if not current_platform.is_cpu():
            return f"attention={config.attention!r} and ALiBi, which its kernels for GPUs do not add up right"
    return None


def _refused(vllm_config: Any) -> list[tuple[bool, str]]:
    model, cache, parallel = (
        vllm_config.model_config,
        vllm_config.cache_config,
        vllm_config.parallel_config,
    )
    config = text_config(model)
    return [
        (model.use_mla, "multi-head latent attention (MLA)"),
        (
            bool(getattr(config, "attn_logit_softcapping", None)),
            f"soft-capped scores (attn_logit_softcapping={getattr(config, 'attn_logit_softcapping', None)})",
        ),
        (
            model.uses_mrope,
            "multimodal rotary positions, which do not count tokens",
        ),
        (
            model.is_mm_prefix_lm,
            "pictures whose tokens see later ones; for text alone, --limit-mm-per-prompt '{\"image\": 0}'",
        ),
        (
            model.rswa_window is not None,
            f"reference sliding windows (rswa_window={model.rswa_window})",
        ),
        (
            parallel.decode_context_parallel_size > 1,
            f"decode_context_parallel_size={parallel.decode_context_parallel_size}, which joins shards of keys "
            "inside the kernels",
        ),
        (
            parallel.prefill_context_parallel_size > 1,
            f"prefill_context_parallel_size={parallel.prefill_context_parallel_size}",
        ),
        (
            cache.cache_dtype.startswith(("fp8", "nvfp4", "int")),
            f"a quantized cache (kv_cache_dtype={cache.cache_dtype!r}), which was not tested",
        ),
        (cache.kv_sharing_fast_prefill, "kv_sharing_fast_prefill, which was not tested"),
    ]


def _draft_reason(model: Any, speculation: Any) -> str | None:
    """Why speculation is refused: what drafts must run what the model runs."""
    if speculation is None or speculation.method in WITHOUT_DRAFT_MODEL:
        return None
    from ..hf.settings import model_settings

    draft = speculation.draft_model_config
    if not asks(model) and not asks(draft):
        return None
    if speculation.method != "draft_model":
        return f"drafts by {speculation.method!r}; use ngram, suffix, or a draft model with the same mass"
    own, others = (
        model_settings(text_config(each)) if asks(each) else None for each in (model, draft)
    )
    if own != others:
        return f"the draft model {draft.model!r}, whose config.stablemask is not the model's"
    return None


def _checking(check_and_update_config: Callable[..., None]) -> Callable[..., None]:
    def checked(cls: type, vllm_config: Any) -> None:
        check(vllm_config)
        if asks(vllm_config.model_config):
            choose_backend(vllm_config)
        check_and_update_config(cls, vllm_config)

    return checked


def _watching(init: Callable[..., None]) -> Callable[..., None]:
    def watched(self: Any, *args: Any, **kwargs: Any) -> None:
        from vllm.config import get_current_vllm_config

        init(self, *args, **kwargs)
        config = get_current_vllm_config()
        if asks(config.model_config):
            prepare(self, config)

    return watched


def prepare(layer: Any, vllm_config: Any) -> None:
    """Have an attention layer of a model with a mass run it.

    Raises:
        ValueError: it would run something else.
    """
    from vllm.distributed import get_tensor_model_parallel_rank
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models.utils import extract_layer_index

    from ..hf.settings import model_settings
    from .mass import AttentionWithMass

    kind = getattr(layer, "attn_type", "decoder")
    if kind in ("encoder", "encoder_decoder"):
        return  # not causal: as under Transformers, without a mass
    impl, config = layer.impl, text_config(vllm_config.model_config)
    reason = None
    if not isinstance(impl, AttentionWithMass):
        reason = (
            f"{layer.get_attn_backend().get_name()} runs no mass: leave --attention-backend out, or name one "
            "that does"
        )
    elif type(layer) is not Attention or kind != "decoder":
        reason = f"{type(layer).__name__} ({kind}) is not an attention over all of the past"
    elif impl.logits_soft_cap:  # type: ignore[attr-defined]
        reason = f"soft-capped scores (logits_soft_cap={impl.logits_soft_cap})"  # type: ignore[attr-defined]
    elif (
        layer.num_heads * vllm_config.parallel_config.tensor_parallel_size
        != config.num_attention_heads
    ):
        reason = f"{layer.num_heads} query heads on a rank, of {config.num_attention_heads}"
    if reason is not None:
        raise ValueError(f"StableMask cannot run in {layer.layer_name}: {reason}")
    impl.prepare(
        layer,
        model_settings(config),
        config.num_attention_heads,
        vllm_config.model_config.max_model_len,
        extract_layer_index(layer.layer_name),
        get_tensor_model_parallel_rank(),
    )


def _knowing(init: Callable[..., None]) -> Callable[..., None]:
    def knowing(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        init(self, vllm_config, *args, **kwargs)
        self.served_config = vllm_config.model_config.hf_config

    return knowing


def _loading(load_adapter: Callable[..., Any]) -> Callable[..., Any]:
    def loading(self: Any, lora_request: Any) -> Any:
        check_adapter(lora_request.lora_path, self.served_config)
        return load_adapter(self, lora_request)

    return loading


def check_adapter(path: str, config: Any) -> None:
    """Refuse an adapter that was trained with another mass than the model runs, or with one where it has none.

    Args:
        path: a folder, or a name on the hub.
        config: of the model.

    Raises:
        ValueError: it was.
    """
    from ..hf.adapters import adapter_settings, running_settings, settle

    settings = adapter_settings(path)
    if settings is not None and running_settings(config) is None:
        raise ValueError(
            f"the adapter {path} was trained with StableMask, and the model runs softmax: "
            "`stablemask merge` makes one model of both"
        )
    settle(config, settings, f"the adapter {path}")


def _wrap(owner: type, name: str, wrap: Callable[..., Any]) -> None:
    """Put what ``wrap`` makes of a method in its place, once."""
    from ..hf.guard import wrap_method

    wrap_method(owner, name, wrap)


def _tell_untested(here: str) -> None:
    if ".".join(map(str, release(here)[:2])) not in TESTED:
        print(
            f"stablemask was tested with vLLM {' and '.join(TESTED)}, not with {here}",
            file=sys.stderr,
            flush=True,
        )
