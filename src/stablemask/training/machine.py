"""What the machine and a launcher give a run, which no option names."""

import os


def world_size() -> int:
    """How many processes a launcher such as torchrun has started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def default_dtype(*, large: bool = False) -> str:
    """``bfloat16`` where the hardware multiplies it faster than float32, else ``float32``.

    A CPU that has its products but no tiles of them gains on ``large`` models alone: others spend their time
    on casts.
    """
    import torch

    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    # What PyTorch was told not to use (ATEN_CPU_CAPABILITY) is as good as not there.
    products = (
        large
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.cpu._is_avx512_bf16_supported()
    )
    return "bfloat16" if products or torch.cpu._is_amx_tile_supported() else "float32"
