"""What computes a tensor: asked here alone, so that tests can stand in for a GPU that is not there."""

import torch
from torch import Tensor

from .calls import constant_while_compiling


def kind_of(tensor: Tensor) -> str:
    """``"cpu"``, ``"cuda"``, or another type of device."""
    return tensor.device.type


@constant_while_compiling
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, such as (9, 0); (8, 0) where shapes are worked out without one."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (8, 0)


@constant_while_compiling
def cudnn_version() -> int | None:
    """Such as 91900, or None where PyTorch was built without cuDNN."""
    return torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
