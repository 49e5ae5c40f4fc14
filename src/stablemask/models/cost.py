"""What a model costs, worked out from its configuration without allocating its weights.

Letters: d hidden_size, f intermediate_size, L layers, V vocabulary, h head_dim, H query heads,
K key and value heads, T context, B batch.
"""

import copy
from typing import NamedTuple

import torch

from .configuration import StableMaskConfig
from .loss import CHUNK_LOGITS
from .modeling import StableMaskForCausalLM
from .presets import FRONT_TOKENS


class Flops(NamedTuple):
    """Floating-point operations per token; a multiplication and an addition are two."""

    forward: int
    training: int


def count_parameters(config: StableMaskConfig) -> int:
    """Parameters of the causal language model, a tied embedding counted once."""
    with torch.device("meta"):
        model = StableMaskForCausalLM(copy.deepcopy(config))
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(config: StableMaskConfig, context: int) -> Flops:
    """Matrix multiplications of one token in a sequence of ``context``.

        forward  = 2 (L (2 d h (H + K) + 3 d f) + d V)  +  4 L H h T
        training = 3 forward          (the backward pass costs twice the forward)

    A gate of the heads adds 2 L d H. The last term is attention, counted in full as is the custom (PaLM,
    arXiv 2204.02311, appendix B); a causal kernel skips about half of it. Norms, rotations, the sink logit
    and a token in front, one more in T, are left out.
    """
    d, layers = config.hidden_size, config.num_hidden_layers
    forward = 2 * (layers * _layer_matrices(config) + d * config.vocab_size)
    forward += 4 * layers * config.query_width * context
    return Flops(forward, 3 * forward)


def _layer_matrices(config: StableMaskConfig) -> int:
    """Parameters of a layer that are multiplied by its input."""
    d, width = config.hidden_size, config.query_width + config.key_value_width
    gate = config.num_attention_heads if config.attention == "head-gate" else 0
    return d * (2 * width + 3 * config.intermediate_size + gate)


def training_memory(
    config: StableMaskConfig,
    batch_size: int,
    context: int,
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    *,
    chunked_loss: bool = False,
    devices: int = 1,
    fsdp: bool = False,
    context_parallel: int = 1,
) -> dict[str, int]:
    """Estimated bytes of one AdamW training step on each device, by what they hold, and their ``total``.

    Weights, gradients and both AdamW moments are float32; ``dtype`` is what the forward pass
    computes in, under autocast where it is not float32. With s the bytes of ``dtype``:

        weights     4 N                 (N parameters)
        gradients   4 N
        optimizer   8 N
        activations B T L layer,  layer = s (2 d + 2 h (H + K) + 4 f) + 4 (2 d + H + 2)
                    with gradient checkpointing  B T (4 d L + layer)
        logits      B T V (s + 8),  their log-softmax and its gradient in float32
                    with the chunked loss  C (4, or 6 in bfloat16) + 4 d V,  a chunk of
                    C = min(B T V, CHUNK_LOGITS) logits, and the head's gradient, early

    On several devices DDP copies the gradients into buckets, 4 N more. FSDP2 divides weights,
    gradients and optimizer by the devices; on top come, gathered, s times the weights outside the
    layers, for the whole step, and those of a layer. Context parallelism divides T.

    A gate of the heads adds s (h + 1) H to a layer. A token in front adds (s h + 4) H, and itself to T; a sink
    key adds 4 H and, with RoPE, 4 h H / B for being rotated. The scores of the last two are float32: below
    it they keep 4 h H of the query.

    A layer keeps what autograd saves without torch.compile: of its two norms the input (float32, the
    residual stream) and the output, query, key, value and the attention's output, its logsumexp, and
    four tensors of the SwiGLU. The allocator's overhead, autocast's copies of the weights and a dense
    padding mask come on top.
    """
    size = torch.empty(0, dtype=dtype).element_size()
    d, layers = config.hidden_size, config.num_hidden_layers
    width, kv_width = config.query_width, config.key_value_width
    parameters = count_parameters(config)
    has_front = config.attention in FRONT_TOKENS
    tokens = batch_size * (context + has_front) // context_parallel
    layer = size * (2 * d + 2 * (width + kv_width) + 4 * config.intermediate_size)
    layer += 4 * (2 * d + config.num_attention_heads + 2)
    if config.attention == "head-gate":
        layer += size * (width + config.num_attention_heads)
    if has_front or config.attention == "key-sink":
        layer += 4 * config.num_attention_heads + (4 * width if size < 4 else 0)
    if has_front:
        layer += size * width
    elif config.attention == "key-sink" and config.position_encoding == "rope":
        layer += 4 * width // batch_size
    if gradient_checkpointing:
        activations = tokens * (4 * d * layers + layer)
    else:
        activations = tokens * layers * layer
    logits = tokens * config.vocab_size
    if chunked_loss:
        logits = min(logits, CHUNK_LOGITS) * (4 if dtype == torch.float32 else 4 + size)
        logits += 4 * d * config.vocab_size
    else:
        logits *= size + 8
    shards = devices if fsdp else 1
    memory = {
        "weights": 4 * parameters // shards,
        "gradients": 4 * parameters // shards,
        "optimizer": 8 * parameters // shards,
        "activations": activations,
        "logits": logits,
    }
    if fsdp:
        layer_weights = _layer_matrices(config) + 2 * d
        outside = parameters - layers * layer_weights
        memory["gathered"] = size * (outside + layer_weights)
    elif devices > 1:
        memory["buckets"] = 4 * parameters
    return {**memory, "total": sum(memory.values())}
