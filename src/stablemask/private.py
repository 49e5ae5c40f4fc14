"""Every private part of another library that this one uses or overrides, and what is counted on in it.

Private is what has an underscore, and what no documentation promises: an internal module, a method that
is only there to be called by its own library. Such a name may change with any release, and a method of
ours that overrides one would then not be called, without a word. :func:`missing` holds each against what
is installed; ``stablemask env`` prints it, and ``tests/test_private.py`` fails by the name, there as for
a private name of our sources that is not listed here.

The value of a name: the parameters by which it is called, or by which it calls ours, in their order;
``a|b`` is either of two, as versions have it. None: that it is there.
"""

import importlib
import inspect
from importlib.util import find_spec
from typing import Any

PRIVATE: dict[str, str | None] = {
    # What watches a call in eager mode, asked for in each.
    "torch._C._are_functorch_transforms_active": None,
    "torch._C._functorch.get_unwrapped": None,
    "torch._C._functorch.is_functorch_wrapped_tensor": None,
    "torch._C._functorch.is_legacy_batchedtensor": None,
    "torch._C._get_tracing_state": None,
    "torch._C._len_torch_dispatch_stack": None,
    "torch.autograd.forward_ad._current_level": None,
    "torch._C._ExcludeDispatchKeyGuard": None,
    "torch._C.DispatchKey.ADInplaceOrView": None,
    "torch._C.DispatchKeySet": None,
    "torch.Tensor._version": None,
    # Set as `torch.compiler.assume_constant_result` sets it.
    "torch._dynamo.decorators._dynamo_marked_constant": None,
    "torch._dynamo.config.recompile_limit": None,  # of benchmarks
    "torch._decomp.register_decomposition": "aten_op, registry, type",
    "torch.cpu._is_amx_tile_supported": "",
    "torch.cpu._is_avx512_bf16_supported": "",
    # The stock kernels.
    "torch._scaled_dot_product_flash_attention_for_cpu": None,
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": (
        "query, key, value, dropout_p, is_causal, attn_mask, scale"
    ),
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward": (
        "grad_out, query, key, value, out, logsumexp, dropout_p, is_causal, attn_mask, scale"
    ),
    "torch.ops.aten._scaled_dot_product_flash_attention": (
        "query, key, value, dropout_p, is_causal, return_debug_mask, scale"
    ),
    "torch.ops.aten._scaled_dot_product_flash_attention_backward": (
        "grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, "
        "is_causal, philox_seed, philox_offset, scale"
    ),
    "torch.ops.aten._flash_attention_forward": (
        "query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, "
        "scale, window_size_left, window_size_right"
    ),
    "torch.ops.aten._flash_attention_backward": (
        "grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, "
        "is_causal, philox_seed|rng_state, philox_offset|unused, scale, window_size_left, window_size_right"
    ),
    "torch.ops.aten._scaled_dot_product_cudnn_attention": (
        "query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, return_debug_mask, scale"
    ),
    "torch.ops.aten._scaled_dot_product_cudnn_attention_backward": (
        "grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, "
        "cum_seq_k, max_q, max_k, dropout_p, is_causal, scale"
    ),
    "torch.ops.aten._scaled_dot_product_efficient_attention": (
        "query, key, value, attn_bias, compute_log_sumexp, dropout_p, is_causal, scale"
    ),
    "torch.ops.aten._scaled_dot_product_efficient_attention_backward": (
        "grad_out_, query, key, value, attn_bias, out, logsumexp, philox_seed, philox_offset, dropout_p, "
        "grad_input_mask, is_causal, scale"
    ),
    # Sharded checkpoints, read without running what is in them.
    "torch.distributed.checkpoint.FileSystemReader.read_metadata": "args, kwargs",
    "torch.distributed.checkpoint.DefaultLoadPlanner.load_bytes": "read_item, value",
    "torch.serialization._get_layout": None,
    # Models.
    "torch.nn.Module._modules": None,
    "torch.nn.Module._parameters": None,
    "transformers.PreTrainedModel._can_compile_fullgraph": None,
    "transformers.PreTrainedModel._can_record_outputs": None,
    "transformers.PreTrainedModel._can_set_attn_implementation": "",
    "transformers.PreTrainedModel._check_and_adjust_attn_implementation": "attn_implementation",
    "transformers.PreTrainedModel._from_config": None,  # of benchmarks
    "transformers.PreTrainedModel._init_weights": "module",
    "transformers.PreTrainedModel._no_split_modules": None,
    "transformers.PreTrainedModel._skip_keys_device_placement": None,
    "transformers.PreTrainedModel._tied_weights_keys": None,
    "transformers.PreTrainedModel._tp_plan": None,
    "transformers.PreTrainedModel.get_correct_attn_implementation": "requested_attention",
    "transformers.PreTrainedModel.post_init": "",
    "transformers.PreTrainedConfig._attn_implementation": None,
    "transformers.PreTrainedConfig._attn_implementation_internal": None,
    "transformers.GenerationMixin._validate_generated_length": "generation_config, input_ids_length",
    # `generate` calls a model by this name of the cache.
    "transformers.GenerationMixin.prepare_inputs_for_generation": (
        "input_ids, past_key_values|cache, attention_mask"
    ),
    "transformers.masking_utils.create_causal_mask": (
        "config, inputs_embeds, attention_mask, past_key_values|cache, position_ids"
    ),
    "transformers.masking_utils.sdpa_mask": "kv_length, mask_function, attention_mask",
    "transformers.masking_utils.causal_mask_function": "batch_idx, head_idx, q_idx, kv_idx",
    "transformers.integrations.sdpa_attention.sdpa_attention_forward": (
        "module, query, key, value, attention_mask, dropout, scaling, is_causal"
    ),
    "transformers.utils.output_capturing.capture_outputs": None,
    "transformers.utils.generic.merge_with_config_defaults": None,
    "transformers.utils.generic.can_return_tuple": None,
    "transformers.models.gpt_oss.modeling_gpt_oss.eager_attention_forward": (
        "module, query, key, value, attention_mask, scaling, dropout"
    ),
    # Training.
    "transformers.Trainer._get_grad_norm": "model, grad_norm",
    "transformers.Trainer._get_output_dir": "trial",
    "transformers.Trainer._load_from_checkpoint": "resume_from_checkpoint, model",
    "transformers.Trainer._load_optimizer_and_scheduler": "checkpoint",
    "transformers.Trainer._load_rng_state": "checkpoint",
    "transformers.Trainer._maybe_log_save_evaluate": None,
    "transformers.Trainer._prepare_inputs": "inputs",
    "transformers.Trainer._save": "output_dir, state_dict",
    "transformers.Trainer._save_checkpoint": "model, trial",
    "transformers.Trainer._save_optimizer_and_scheduler": "output_dir",
    "transformers.Trainer.get_batch_samples": None,
    "transformers.Trainer.save_model": "output_dir, _internal_call",
    # By which a GradScaler has a fused optimizer leave a step out.
    "torch.optim.Adam._step_supports_amp_scaling": None,
    "torch.optim.AdamW.found_inf": None,
    "accelerate.accelerator._is_accelerate_prepared": None,
    "datasets.Dataset._fingerprint": None,
}


def missing(names: dict[str, str | None]) -> list[str]:
    """A line for each name that is not as it is counted on in what is installed.

    Names of packages that are not installed are left out.
    """
    reasons = {
        name: reason_against(name, expected)
        for name, expected in names.items()
        if find_spec(name.partition(".")[0]) is not None
    }
    return [f"{name}: {reason}" for name, reason in reasons.items() if reason]


def reason_against(name: str, parameters: str | None) -> str | None:
    """Why a name is not what is counted on, None where it is."""
    try:
        found = resolve(name)
    except (ImportError, AttributeError) as error:
        return f"is not there ({error})"
    if parameters is None:
        return None
    there = _parameters(found)
    wanted = [part for part in parameters.split(", ") if part]
    places = [
        next((there.index(one) for one in part.split("|") if one in there), None) for part in wanted
    ]
    if None in places or places != sorted(places, key=lambda place: place or 0):
        return f"takes ({', '.join(there)}), and not ({parameters})"
    return None


def resolve(name: str) -> Any:
    """The object of a dotted name.

    An attribute that only instances have is looked for in the source of its module.

    Raises:
        ImportError, AttributeError: there is none.
    """
    first, *rest = name.split(".")
    found: Any = importlib.import_module(first)
    for count, part in enumerate(rest, 1):
        try:
            found = getattr(found, part)
        except AttributeError:
            if inspect.isclass(found) or count == len(rest):
                if part in inspect.getsource(inspect.getmodule(found)):  # type: ignore[arg-type]
                    return None
                raise
            found = importlib.import_module(".".join([first, *rest[:count]]))
    return found


def _parameters(function: Any) -> list[str]:
    schema = getattr(getattr(function, "default", None), "_schema", None)  # of an operator
    if schema is not None:
        return [argument.name for argument in schema.arguments]
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]
