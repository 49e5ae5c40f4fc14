"""A model whose weights, gradients and optimizer lie in shards on several devices: PyTorch's FSDP2."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from ..inference.model import decoder_layers


def shard(model: Any, *, dtype: str, compile: bool = False) -> None:
    """Shard a model over all processes, a decoder layer at a time.

    Args:
        model: a Transformers causal LM with the same weights on every process.
        dtype: ``bfloat16`` gathers and computes in it, with gradients reduced in float32; the shards
            and the optimizer stay float32.
        compile: compile each layer, so that communication stays outside the graphs.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    low = dtype == "bfloat16"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if low else None,
        reduce_dtype=torch.float32 if low else None,
        cast_forward_inputs=False,  # what the layers share, angles and sink logits, stays in float32
    )
    for layer in decoder_layers(model):
        if compile:
            layer.compile()
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    # Accelerate would wrap it in DDP. (Its own FSDP2 turns into DDP on a CPU without a word.)
    model._is_accelerate_prepared = True


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)
