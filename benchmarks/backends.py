"""Which backend is fastest where: the measurements that ``backend="auto"`` chooses by."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from stablemask import strict_json
from stablemask.backends import BACKENDS
from stablemask.backends.choice import KINDS
from stablemask.bars import progress_bar

from .cases import HEADS, Case
from .environment import describe
from .measure import DECODE, FORWARD, TRAINING, measure
from .plan import TOKENS
from .rows import own_rows
from .timing import Budget

DTYPES = ("float32", "bfloat16")
LENGTHS = (64, 256, 1024, 4096)
CACHES = (1024, 4096)
HEAD_DIM = 64

_PASSES = {FORWARD: "inference", TRAINING: "training", DECODE: "decode"}
_BUDGET = Budget(seconds=0.4, min_rounds=2)


def measure_backends(
    device: torch.device | str,
    *,
    lengths: Sequence[int] = LENGTHS,
    caches: Sequence[int] = CACHES,
    dtypes: Sequence[str] = DTYPES,
) -> list[dict[str, Any]]:
    """Median time of every backend that can serve, each first checked against the definition.

    8 heads of 64, as many key heads; as many sequences as make up ``plan.TOKENS``, and one behind a
    cache. A batch is where a wrong choice costs most: at one short sequence every backend is quick.

    Returns:
        One dict a shape, dtype, mask and pass: ``device`` (its type), ``dtype`` ("float32", ...),
        ``kind`` ("causal", "mask", "alibi", "window", "documents"), ``pass`` ("inference", "training"
        for forward and backward, "decode" for one token behind a cache), ``batch``, ``q_len``, ``kv_len``, and
        ``milliseconds``, a dict from the name of a backend to its median; a backend that cannot
        serve, keeps every score of more than 2,048 queries, or compiles on the CPU, is not in it.
    """
    device = torch.device(device)
    rows = {f"stablemask {name}": name for name in BACKENDS}
    own = [replace(row, watched=True) for row in own_rows(device.type) if row.name in rows]
    if device.type == "cpu":  # "auto" never takes what must first run a C++ compiler
        own = [row for row in own if not row.compiled]
    tokens = TOKENS.get(device.type, TOKENS["cpu"])
    shapes = [(max(1, tokens // n), n, n) for n in lengths] + [(1, 1, m) for m in caches]
    cells = list(product(dtypes, KINDS, shapes))
    found: dict[tuple, dict[str, Any]] = {}
    for dtype, kind, (batch, q_len, kv_len) in progress_bar(cells, unit="cell", leave=False):
        case = Case(device.type, dtype, batch, q_len, kv_len, HEAD_DIM, mask=kind)
        cell = measure(case, own, _BUDGET)
        for skipped in cell.not_timed:
            if skipped["incorrect"]:
                warnings.warn(f"{skipped['row']} on {case}: {skipped['reason']}", stacklevel=2)
        for timing in cell.timings:
            labels = {
                "device": device.type, "dtype": dtype, "kind": kind,
                "pass": _PASSES[timing["pass"]], "batch": batch, "q_len": q_len, "kv_len": kv_len,
            }  # fmt: skip
            entry = found.setdefault(tuple(labels.values()), {**labels, "milliseconds": {}})
            entry["milliseconds"][rows[timing["row"]]] = timing["ms"]
    return list(found.values())


def write_measurements(measurements: list[dict[str, Any]], device: torch.device) -> Path:
    """Put them where ``backend="auto"`` looks for them, ``backends/measured/<device type>.json``."""
    from stablemask import backends

    folder = Path(backends.__file__).parent / "measured"
    shape = {"heads": HEADS, "kv_heads": HEADS, "head_dim": HEAD_DIM}
    result = {**describe(device), "shape": shape, "measurements": measurements}
    return save_json(result, folder / f"{device.type}.json")


def save_json(result: dict[str, Any], path: Path) -> Path:
    """Write whole or not at all; a line for each entry, and for each record of a list."""
    entries = []
    for key, value in result.items():
        text = strict_json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(f"  {strict_json.dumps(record)}" for record in value) + "\n ]"
        entries.append(f" {strict_json.dumps(key)}: {text}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(entries) + "\n}\n", encoding="utf-8")
    return partial.replace(path)
