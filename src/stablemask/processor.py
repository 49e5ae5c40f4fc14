"""What the CPU has for half precision, which decides the fastest way to a result."""

from typing import NamedTuple

import torch


class Units(NamedTuple):
    """Matrix units (AMX), and AVX-512's products of bfloat16."""

    amx: bool
    avx512_bf16: bool


# What PyTorch was told not to use (ATEN_CPU_CAPABILITY) is as good as not there.
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
UNITS = Units(
    AVX512 and torch.cpu._is_amx_tile_supported(),
    AVX512 and torch.cpu._is_avx512_bf16_supported(),
)
