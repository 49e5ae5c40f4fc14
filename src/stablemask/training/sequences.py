"""Sequences shared by several devices, each of which holds a part of every one (context parallelism)."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from ..distributed import shard_sequence


@dataclass(frozen=True)
class SequenceGroup:
    """The processes that share the sequences of this one."""

    group: dist.ProcessGroup
    size: int

    def share(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """This process's part of whole blocks ``(batch, length)``: tokens, positions and next tokens."""
        ids, labels = batch["input_ids"], batch["labels"]
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        whole = {
            "input_ids": ids,
            "position_ids": positions,
            "shift_labels": F.pad(labels[:, 1:], (0, 1), value=-100),
        }
        part = {name: shard_sequence(t, 1, group=self.group) for name, t in whole.items()}
        return {**part, "labels": part["shift_labels"]}  # the Trainer asks whether there are any


def share_sequences(model: Any, size: int) -> SequenceGroup:
    """Let groups of ``size`` successive processes share the sequences of one of our models."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(
        device, (dist.get_world_size() // size, size), mesh_dim_names=("data", "sequence")
    )
    group = mesh["sequence"].get_group()
    model.model.sequence_group = group
    return SequenceGroup(group, size)
