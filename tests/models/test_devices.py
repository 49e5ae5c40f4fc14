import pytest
import torch

from stablemask.models.devices import PEAKS, peak_flops

# Names that torch.cuda.get_device_name gives, and the dense TFLOP/s in bfloat16 that the data sheets
# give, half of what they give with sparsity.
NAMES = {
    "NVIDIA H100 80GB HBM3": 1979 / 2,
    "NVIDIA H100 PCIe": 1513 / 2,
    "NVIDIA H100 NVL": 1671 / 2,
    "NVIDIA H200": 1979 / 2,
    "NVIDIA H200 NVL": 1671 / 2,
    "NVIDIA GH200 480GB": 1979 / 2,
    "NVIDIA B200": 36_000 / 16,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A10": 250 / 2,
    "NVIDIA A10G": 140 / 2,
    "NVIDIA A40": 299.4 / 2,
    "NVIDIA L40S": 362,
    "NVIDIA L4": 242 / 2,
    "NVIDIA RTX A6000": 309.6 / 2,
    "NVIDIA GeForce RTX 5090": 209.5,
    "NVIDIA GeForce RTX 4090": 330.4 / 2,
    "NVIDIA GeForce RTX 3090": 142 / 2,
    "AMD Instinct MI300X": 1307.4,
    "AMD Instinct MI300X OAM": 1307.4,
}


def test_known_devices_by_the_name_that_torch_gives():
    for name, tera in NAMES.items():
        assert peak_flops(name, torch.bfloat16) == pytest.approx(tera * 1e12, rel=1e-3), name
        # A tensor core does at least twice what the other units do in float32, but for rounding.
        assert peak_flops(name, torch.bfloat16) >= 1.99 * peak_flops(name, torch.float32), name
    for name, tera in (
        ("Tesla V100-SXM2-16GB", 15.7),
        ("Tesla V100-PCIE-16GB", 14),
        ("Tesla T4", 8.1),
    ):
        assert peak_flops(name, torch.float32) == tera * 1e12
        assert peak_flops(name, torch.bfloat16) is None


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce GTX 1080 Ti",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA L40", "cpu", "",
    ],
)  # fmt: skip
def test_no_figure_is_guessed(name):
    assert peak_flops(name, torch.float32) is None


def test_a_cpu_has_none():
    assert peak_flops(torch.device("cpu"), torch.bfloat16) is None


def test_every_row_can_be_reached():
    for peak in PEAKS:
        assert peak_flops(peak.words, torch.float32) == peak.float32 * 1e12


def test_a_cuda_device_is_looked_up_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
    assert peak_flops(torch.device("cuda", 0), torch.bfloat16) == 121e12
