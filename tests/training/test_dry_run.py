"""What ``--dry-run`` says, against figures worked out by hand."""

import pytest
import torch

from stablemask.errors import InputError
from stablemask.training.dry_run import describe_cost
from stablemask.training.pretrain_options import PretrainOptions


def figures(**settings):
    """The lines of a dry run by their names."""
    settings = {"preset": "160m", "dtype": "bfloat16", "dry_run": True, **settings}
    lines = describe_cost(PretrainOptions(**settings)).splitlines()
    return {line[:16].strip(): line[18:] for line in lines}


def gib(figure):
    return float(figure.split()[0])


def test_time_is_flops_over_what_the_devices_reach():
    found = figures(
        steps=32_000, devices=8, batch_size=32, global_batch_size=512, peak_flops=989e12,
    )  # fmt: skip
    assert found["tokens a step"] == "262,144: 2 x 32 blocks of 512 on each of 8 devices"
    assert found["tokens"] == "8,388,608,000 in 32,000 steps"
    assert found["FLOPs"] == "6.694e+18 in all"
    # 6.694e18 / (8 * 989e12 * 0.4) = 2115 s
    assert found["time, estimate"] == "35 min on 8 devices at 40 % of 989 TFLOP/s each"


@pytest.mark.parametrize(
    ("steps", "duration"),
    [(100, "26 s"), (32_000, "2 h 21 min"), (1_000_000, "3 d 1 h")],
)
def test_long_times_are_given_in_days_and_hours(steps, duration):
    found = figures(steps=steps, batch_size=32, global_batch_size=256, peak_flops=989e12)
    assert found["time, estimate"].startswith(f"{duration} on one device at ")


def test_without_a_known_device_it_says_how_to_name_its_speed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = figures(steps=10)
    assert "bfloat16" in found["time, estimate"]
    assert "--peak-flops" in found["time, estimate"]


def test_a_known_device_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100-SXM4-80GB")
    found = figures(steps=10, devices=4)
    assert found["time, estimate"].endswith(
        " on 4 x NVIDIA A100-SXM4-80GB at 40 % of 312 TFLOP/s each"
    )


def test_memory_on_several_devices():
    alone = figures(batch_size=8)
    ddp = figures(batch_size=8, devices=4)
    fsdp = figures(batch_size=8, devices=4, fsdp=True)
    shared = figures(batch_size=8, devices=4, context_parallel=2)
    assert gib(ddp["buckets"]) == gib(alone["gradients"])
    assert gib(fsdp["optimizer"]) == pytest.approx(gib(alone["optimizer"]) / 4, abs=0.01)
    assert gib(fsdp["gathered"]) > 0
    # A chunk of 2^26 logits in float32 and bfloat16, and the head's gradient: never 8 x 512 tokens' all.
    assert gib(alone["logits"]) == pytest.approx((2**26 * 6 + 4 * 768 * 50_304) / 2**30, abs=0.01)
    assert gib(shared["activations"]) == pytest.approx(gib(alone["activations"]) / 2, abs=0.01)
    assert fsdp["tokens a step"].endswith("1 x 8 blocks of 512 on each of 4 devices, FSDP2")
    assert shared["tokens a step"] == "8,192: 1 x 8 blocks of 512 on each 2 of 4 devices"


def test_what_it_cannot_tell_it_refuses():
    with pytest.raises(InputError, match="devices"):
        figures(devices=3, context_parallel=2)
