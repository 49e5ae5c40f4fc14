"""The weights and the optimizer of a run as a distributed checkpoint, written and read in shards.

Every process writes what it holds, in the background if wanted, and any number of processes, sharded or
not, reads what it needs. The format is PyTorch's (torch.distributed.checkpoint).
"""

import io
import pickle
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from .processes import saving_group

# Of one process, which is what is meant.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")


def save_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, *, wait: bool
) -> Future | None:
    """Write a model and its optimizer into ``folder``.

    Returns:
        None when it is written; where not waited for, a future. Training may go on at once either way:
        what is written is a copy.
    """
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    arguments: dict[str, Any] = {
        "checkpoint_id": str(folder),
        "process_group": saving_group(),
        "no_dist": saving_group() is None,
    }
    if wait:
        dcp.save(state, **arguments)
        return None
    written: Any = dcp.async_save(state, **arguments)
    return written


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Read what :func:`save_state` wrote into a model and its optimizer, however either is sharded.

    Nothing in it is run, wherever it comes from.

    Raises:
        UnpicklingError: its index holds what no index does.
        CheckpointException: the rest of it does; on every process.
    """
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    dcp.load(
        state,
        storage_reader=_Reader(folder),
        planner=_Planner(),
        process_group=saving_group(),
        no_dist=saving_group() is None,
    )
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """The weights of a sharded model, gathered on the CPU of the main process; empty on the others."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}
    return {name: weight for name, weight in weights.items() if name not in tied}


class _Reader(dcp.FileSystemReader):
    """Reads the index of a checkpoint, a pickle, with nothing but the classes that belong in it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        # Here, for PyTorch would wrap and log what is wrong with it.
        self._index = _IndexUnpickler(io.BytesIO((folder / ".metadata").read_bytes())).load()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        index = self._index
        if getattr(index, "storage_meta", None) is None:
            index.storage_meta = dcp.metadata.StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


class _Planner(dcp.DefaultLoadPlanner):
    """Reads what is no tensor, the numbers of an optimizer, as data: the default would run a pickle."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        data = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), data)
        data.seek(0)
        super().load_bytes(read_item, data)


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _IN_AN_INDEX or (module == "torch" and _is_dtype(name)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a checkpoint's index holds no {module}.{name}")


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


_IN_AN_INDEX = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties",
            "BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    ),
}  # fmt: skip
