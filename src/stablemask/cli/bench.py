"""Time the attention against stock SDPA and the dense definition, and training against softmax."""

import json
import platform
import shlex
import sys
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from stablemask import __version__
from stablemask.benchmarks.attention import MAX_DENSE_LENGTH, ROWS, Timing, check, measure
from stablemask.errors import InputError
from stablemask.options import option

SUMMARY = "time the attention against stock SDPA and the definition"
LENGTHS = [256, 512, 1024, 2048, 4096, 8192]
TOKENS = 4096


@dataclass(kw_only=True)
class BenchOptions:
    quick: bool = option(False, "fewer lengths, about three minutes")
    lengths: list[int] | None = option(None, "sequence lengths; by default 256 to 8192")
    dtypes: list[str] = option(["float32", "bfloat16"], "of the tensors")
    rounds: int | None = option(None, "times each row runs; by default 11")
    memory: bool = option(True, "measure peak memory too, each in a process of its own")
    training: bool = option(True, "time training steps of the tiny preset too")
    save: str | None = option(None, "folder for a JSON file with the result")


def run(options: BenchOptions) -> None:
    lengths = options.lengths or ([512, 1024, 2048] if options.quick else LENGTHS)
    rounds = options.rounds or 11
    if min(lengths) < 1 or rounds < 1:
        raise InputError(f"lengths and rounds must be at least 1, got {lengths} and {rounds}")
    for dtype in options.dtypes:
        if dtype not in ("float32", "bfloat16", "float16", "float64"):
            raise InputError(f"dtypes must be float32, bfloat16, float16 or float64, got {dtype!r}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {
        "benchmark": "attention",
        "date": date.today().isoformat(),
        "command": shlex.join(["stablemask", *sys.argv[1:]]),
        "hardware": hardware(device),
        "versions": {
            "stablemask": __version__, "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "tokens": TOKENS,
        "rounds": rounds,
        "distance_from_definition": check(),
    }  # fmt: skip
    print(f"{result['hardware']}; torch {torch.__version__}")
    distance = result["distance_from_definition"]
    print(f"correct: float64 outputs and gradients within {distance:.0e} of the definition\n")

    dense = sum(length <= MAX_DENSE_LENGTH for length in lengths)
    total = len(options.dtypes) * (len(lengths) * (len(ROWS) - 1) + dense)
    timings = []
    print(_HEADER)
    with tqdm(total=total, unit="row", leave=False, disable=None) as bar:
        for timing in measure(
            lengths, options.dtypes, tokens=TOKENS, rounds=rounds, device=device,
            memory=options.memory,
        ):  # fmt: skip
            timings.append(timing)
            bar.update()
            bar.write(_line(timing), file=sys.stdout)
            sys.stdout.flush()
    result["attention"] = [asdict(timing) for timing in timings]

    if options.training:
        from stablemask.benchmarks.training import measure_training

        result["training"] = {}
        print("\ntraining the tiny preset, 16 x 256 tokens a step")
        for dtype in [name for name in options.dtypes if name in ("float32", "bfloat16")]:
            measured = measure_training(
                "tiny", batch_size=16, steps=rounds, dtype=dtype, device=device
            )
            result["training"][dtype] = measured
            for row, numbers in measured.items():
                print(
                    f"{row:<12} {dtype:<9} {numbers['tokens_per_second']:>10,.0f} tokens/s "
                    f"{numbers['ratio']:>6.3f} of sdpa"
                )
    print()
    print(json.dumps(result))
    if options.save:
        path = Path(options.save) / f"attention-{device.type}-{result['date']}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(result, indent=1) + "\n")
        partial.replace(path)


def hardware(device: torch.device) -> str:
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


_HEADER = (
    f"{'row':<12} {'dtype':<9} {'length':>6} {'forward':>11} {'':>7} {'fwd+bwd':>11} {'':>7} "
    f"{'peak':>11} {'':>7}"
)


def _line(timing: Timing) -> str:
    peak, ratio = f"{'':>11}", ""
    if timing.peak_mib is not None:
        peak, ratio = f"{timing.peak_mib:>7.1f} MiB", f"{timing.peak_ratio:.3f}x"
    return (
        f"{timing.row:<12} {timing.dtype:<9} {timing.length:>6} "
        f"{timing.forward_ms:>8.2f} ms {timing.forward_ratio:>6.3f}x "
        f"{timing.both_ms:>8.2f} ms {timing.both_ratio:>6.3f}x {peak} {ratio:>7}"
    )
