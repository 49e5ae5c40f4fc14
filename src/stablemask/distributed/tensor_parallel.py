"""Heads and batches on several ranks: everything follows the query.

Attention mixes neither sequences nor heads, so a rank that holds some of them computes them alone, by
the same function, and nothing is sent in the forward pass. What has to be right is which slice of every
other tensor a rank gets, the gamma or sink of *its* heads, and which gradients are sums over ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

BATCH, HEADS = 0, 1  # axes of query, the two that may be sharded

# The axis of each argument that runs along the batch and along the heads, counted from its last.
_AXES: dict[str, dict[int, int]] = {
    "query": {BATCH: -4, HEADS: -3},
    "key": {BATCH: -4, HEADS: -3},
    "value": {BATCH: -4, HEADS: -3},
    "sink_logits": {BATCH: -3, HEADS: -2},
    "gamma": {HEADS: -1},
    "positions": {BATCH: -2},
    "attn_mask": {BATCH: -4, HEADS: -3},
    "alibi_slopes": {HEADS: -1},
    "documents": {BATCH: -2},
}


def attend_on_shards(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, **arguments: Any
) -> Tensor:
    """Run an attention on each rank's part of DTensors.

    Args:
        attend: takes ``query, key, value, **arguments``, as ``sink_attention`` does.
        query: DTensor ``(batch, heads, q_len, head_dim)``; along each dimension of its mesh it is
            ``Shard(0)``, ``Shard(1)`` or ``Replicate()``, in equal parts.
        key, value: DTensors of the same mesh, moved to the placements of query where theirs differ.
            Fewer key heads than ranks are replicated, and each rank reads the one of its queries.
        arguments: those of ``attend``, at their global shapes. A tensor follows the query along the
            axes they share; a plain one is taken as replicated, and its gradient is the whole one on
            every rank.

    Returns:
        A DTensor with the mesh and placements of query. Each rank draws its own dropout.

    Raises:
        TypeError, ValueError: a placement, mesh or size does not fit.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, DTensor):
            raise TypeError(
                f"query, key and value must be DTensors together, {name} is {type(tensor).__name__}"
            )
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must be (batch, heads, length, head_dim), got shape {tuple(tensor.shape)}"
            )
    assert isinstance(query, DTensor)
    shards = Shards(query.device_mesh, query.placements, query.shape[BATCH], query.shape[HEADS])
    shards.check()
    out = attend(
        shards.local("query", query),
        shards.local_keys("key", key),
        shards.local_keys("value", value),
        **{name: shards.local(name, value) for name, value in arguments.items()},
    )
    return DTensor.from_local(out, query.device_mesh, query.placements, run_check=False)


def head_shards(projection: nn.Module, heads: int, local_heads: int) -> "Shards":
    """Which of the query's heads a rank holds, from the sharded projection that made them.

    Args:
        projection: the linear layer of the queries, its weight sharded by ``parallelize_module`` or by
            Transformers' tensor parallelism.
        heads, local_heads: how many there are, and how many came out of the projection.

    Raises:
        ValueError: the projection does not say which.
    """
    weight = projection.weight
    # Transformers had plain local parameters, and this attribute, before it had DTensors.
    mesh: Any = weight.device_mesh if isinstance(weight, DTensor) else None
    mesh = mesh or getattr(projection, "_hf_device_mesh", None)
    if mesh is not None:
        rows = weight.placements if isinstance(weight, DTensor) else (Shard(0),) * mesh.ndim
        along_heads = tuple(Shard(HEADS) if _shards(p, 0) else Replicate() for p in rows)
        shards = Shards(mesh, along_heads, 1, heads)
        if shards.count(HEADS) * local_heads == heads:
            return shards
    raise ValueError(
        f"the query projection gave {local_heads} of {heads} heads, and its weight does not say "
        "which: shard it by rows, as ColwiseParallel or Transformers' tp_plan='auto' does"
    )


def _shards(placement: Placement, axis: int) -> bool:
    # Not isinstance: a strided shard, which is a subclass in some versions, is laid out otherwise.
    return type(placement) is Shard and placement.dim == axis


@dataclass(frozen=True)
class Shards:
    """How a query lies on a mesh.

    Attributes:
        mesh, placements: of the query.
        batch, heads: its global sizes.
    """

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    batch: int
    heads: int

    def count(self, axis: int) -> int:
        """Into how many parts an axis of the query is cut."""
        count = 1
        for dim, placement in enumerate(self.placements):
            if _shards(placement, axis):
                count *= self.mesh.size(dim)
        return count

    def index(self, axis: int) -> int:
        """Which of those parts is this rank's."""
        index = 0
        for dim, placement in enumerate(self.placements):
            if _shards(placement, axis):
                index = index * self.mesh.size(dim) + self.mesh.get_local_rank(dim)
        return index

    def check(self) -> None:
        for placement in self.placements:
            if not (placement.is_replicate() or _shards(placement, 0) or _shards(placement, 1)):
                raise ValueError(
                    "query must be Shard(0) (batch), Shard(1) (heads) or Replicate() along each mesh "
                    f"dimension, got {self.placements}; for a sharded sequence there is "
                    "stablemask.distributed.context_parallel_attention"
                )
        for axis, name, size in ((BATCH, "batch", self.batch), (HEADS, "heads", self.heads)):
            if size % self.count(axis):
                raise ValueError(
                    f"{name} must be a multiple of the {self.count(axis)} ranks it is sharded over, "
                    f"got {size}"
                )

    def local_keys(self, name: str, tensor: Tensor) -> Tensor:
        """This rank's part of key or value, whose heads may be fewer than the ranks."""
        parts, kv_heads = self.count(HEADS), tensor.shape[HEADS]
        keys = replace(self, heads=kv_heads)
        if kv_heads % parts == 0:
            return keys.local(name, tensor)
        if parts % kv_heads:
            raise ValueError(
                f"kv_heads must be a multiple or a divisor of the {parts} ranks that the heads are "
                f"sharded over, got {kv_heads}"
            )
        every_head = keys.local(name, tensor, {BATCH: -4})
        return every_head.narrow(HEADS, self.index(HEADS) * kv_heads // parts, 1)

    def local(self, name: str, argument: Any, axes: dict[int, int] | None = None) -> Any:
        """This rank's part of an argument of the attention; what is no tensor is returned as it is."""
        if not isinstance(argument, Tensor):
            return argument
        if axes is None:
            axes = _AXES[name]
        shared = {
            axis: self._shared_axis(name, argument, axis, axes.get(axis)) for axis in (BATCH, HEADS)
        }
        if isinstance(argument, DTensor):
            if argument.device_mesh != self.mesh:
                raise ValueError(
                    f"{name} must be on the mesh of query, {self.mesh}, got {argument.device_mesh}"
                )
        elif argument.requires_grad and torch.is_grad_enabled():
            replicated = [Replicate()] * self.mesh.ndim
            argument = DTensor.from_local(argument, self.mesh, replicated, run_check=False)
        else:
            for axis, dim in shared.items():
                if dim is not None:
                    argument = argument.chunk(self.count(axis), dim)[self.index(axis)]
            return argument

        targets: list[Placement] = []
        gradients: list[Placement] = []
        for placement in self.placements:
            dim = shared[placement.dim] if isinstance(placement, Shard) else None
            targets.append(Replicate() if dim is None else Shard(dim))
            # A rank that holds some rows of the query has a part of this gradient's sum.
            summed = dim is None and not placement.is_replicate()
            gradients.append(Partial() if summed else targets[-1])
        return argument.redistribute(placements=targets).to_local(grad_placements=gradients)

    def _shared_axis(self, name: str, tensor: Tensor, axis: int, where: int | None) -> int | None:
        """Where a tensor has an axis along which the query is cut; None where it is broadcast."""
        if where is None or tensor.dim() < -where or tensor.shape[where] == 1:
            return None
        if self.count(axis) == 1:
            return None
        of_query, expected = ("batch", self.batch) if axis == BATCH else ("heads", self.heads)
        if tensor.shape[where] != expected:
            raise ValueError(
                f"{name} must have {of_query} = {expected} or 1 along axis {where}, "
                f"got shape {tuple(tensor.shape)}"
            )
        return tensor.dim() + where
