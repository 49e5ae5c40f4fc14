"""What the CPU has for half precision, which decides the fastest way to a result."""

from typing import NamedTuple

import torch


class Units(NamedTuple):
    """Matrix units (AMX), and AVX-512's products of bfloat16."""

    amx: bool
    avx512_bf16: bool


UNITS = Units(torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported())
