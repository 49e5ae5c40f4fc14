"""What the machine and a launcher give a run, which no option names."""

import os


def world_size() -> int:
    """How many processes a launcher such as torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def default_dtype() -> str:
    """``bfloat16`` where the hardware multiplies it faster than float32, else ``float32``."""
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if torch.cpu._is_amx_tile_supported() else "float32"
