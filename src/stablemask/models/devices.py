"""How fast devices multiply matrices at best, for the share of it that a model reaches."""

import re
from typing import NamedTuple

import torch


class Peak(NamedTuple):
    """TFLOP/s of a device; None where its hardware has no such arithmetic."""

    words: str  # all of them stand in the device's name
    bfloat16: float | None
    float32: float


# Dense: data sheets often give twice as much, "with sparsity". float32 without TF32, which PyTorch
# leaves off. The first row whose words are all in the name counts, so a variant stands before the
# device it is a variant of.
PEAKS = (
    # NVIDIA DGX B200 data sheet: 36 PFLOP/s for eight, sparse; HGX B200: 75 in float32.
    Peak("B200", 2250, 75),
    # NVIDIA H200 data sheet: 1,979 (SXM) and 1,671 (NVL), sparse.
    Peak("H200 NVL", 835.5, 60),
    Peak("H200", 989.5, 67),
    # NVIDIA GH200 data sheet: 990.
    Peak("GH200", 989.5, 67),
    # NVIDIA H100 data sheet: 1,979 (SXM) and 1,671 (NVL), sparse.
    Peak("H100 NVL", 835.5, 60),
    # NVIDIA H100 data sheet of 2022: 1,513 (PCIe), sparse.
    Peak("H100 PCIe", 756.5, 51),
    Peak("H100", 989.5, 67),
    # NVIDIA A100 data sheet: the same for SXM and PCIe.
    Peak("A100", 312, 19.5),
    # NVIDIA A10 data sheet.
    Peak("A10", 125, 31.2),
    # NVIDIA A10G data sheet, of Amazon's G5.
    Peak("A10G", 70, 35),
    # NVIDIA A40 data sheet.
    Peak("A40", 149.7, 37.4),
    # NVIDIA RTX A6000 data sheet: 309.7 in half precision, sparse.
    Peak("RTX A6000", 154.8, 38.7),
    # NVIDIA L40S data sheet.
    Peak("L40S", 362, 91.6),
    # NVIDIA L4 data sheet: 242, sparse.
    Peak("L4", 121, 30.3),
    # NVIDIA Tesla V100 data sheet: 15.7 (SXM2), 14 (PCIe).
    Peak("V100 PCIe", None, 14),
    Peak("V100", None, 15.7),
    # NVIDIA T4 data sheet.
    Peak("T4", None, 8.1),
    # NVIDIA Blackwell architecture white paper (RTX), appendix: accumulated in float32.
    Peak("RTX 5090", 209.5, 104.8),
    # NVIDIA Ada architecture white paper, appendix A: accumulated in float32.
    Peak("RTX 4090", 165.2, 82.6),
    # NVIDIA Ampere GA102 white paper, appendix A: accumulated in float32.
    Peak("RTX 3090", 71, 35.6),
    # AMD Instinct MI300X data sheet: matrix units.
    Peak("MI300X", 1307.4, 163.4),
)

# With one of these in its name, a device is another one than the row's, or a part of it.
VARIANTS = {"d", "laptop", "mig", "super", "ti"}


def peak_flops(device: str | torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of a device at its best, dense; None where it is not known, as for a CPU.

    Args:
        device: a CUDA device, or a name that ``torch.cuda.get_device_name`` gives.
        dtype: what the matrices are in, float32 or bfloat16.
    """
    if isinstance(device, torch.device):
        if device.type != "cuda":
            return None
        device = torch.cuda.get_device_name(device)
    words = _words(device)
    for peak in PEAKS:
        if _words(peak.words) <= words and not VARIANTS & words:
            tera = {torch.bfloat16: peak.bfloat16, torch.float32: peak.float32}.get(dtype)
            return None if tera is None else tera * 1e12
    return None


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower()))
