"""What a measurement is worth nothing without: hardware, versions, date and command; and its file."""

import platform
import shlex
import sys
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from stablemask import __version__, strict_json
from stablemask.backends import native
from stablemask.writing import write_whole

# Whatever is timed, or compiles what is timed.
PACKAGES = (
    "torch", "triton", "transformers", "x-transformers", "flash-attention-softmax-n",
    "flash-attn", "einops", "accelerate", "litgpt", "lightning",
)  # fmt: skip


def describe(device: torch.device) -> dict[str, Any]:
    return {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        "hardware": hardware(device),
        "library": native.in_use()["library"],
        "rules": native.RULES,
        "versions": versions(),
    }


def hardware(device: torch.device) -> str:
    """Name of the GPU, or of the CPU with the threads and the vector instructions PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "stablemask": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def save_json(result: dict[str, Any], path: Path) -> None:
    """Write whole or not at all; a line for each entry, and for each record of a list, to be compared by line."""
    entries = []
    for key, value in result.items():
        text = strict_json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(f"  {strict_json.dumps(record)}" for record in value) + "\n ]"
        entries.append(f" {strict_json.dumps(key)}: {text}")
    write_whole(path, "{\n" + ",\n".join(entries) + "\n}\n")
