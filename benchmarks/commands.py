"""The commands that time attention, training and generation, and what their runs have in common.

Every row is first checked against the definition in float64; ratios are to stock SDPA in the same rounds.
"""

import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from stablemask import strict_json
from stablemask.bars import progress_bar
from stablemask.errors import InputError, RunError
from stablemask.options import option
from stablemask.shell import pip_install

from . import plan, tables
from .cases import HEADS
from .environment import describe
from .measure import measure
from .memory import can_measure, peak_memory
from .rows import MAX_DENSE_LENGTH, Row, all_rows

Value = TypeVar("Value")
DTYPES = ("float32", "bfloat16", "float16")
MEMORY_ROWS = ("sdpa", "stablemask", "definition")
GPU_SECONDS = 500.0  # what a GPU that is lent for ten minutes has


@dataclass(kw_only=True)
class RunOptions:
    """Of every run."""

    quick: bool = option(False, "fewer lengths, shapes and rounds")
    dtypes: list[str] | None = option(
        None, "of the tensors; by default float32 and bfloat16, on a GPU bfloat16", choices=DTYPES
    )
    budget: float | None = option(
        None, "seconds after which nothing more is begun; by default 500 on a GPU, else no limit"
    )
    save: str | None = option(None, "folder for a JSON file and a figure of the result")


@dataclass(kw_only=True)
class AttentionOptions(RunOptions):
    lengths: list[int] | None = option(
        None, "of sequences and of caches; by default 512 to 16384, and caches of 1024 to 16384"
    )
    head_dims: list[int] = option([64, 128], "the first at every length, the others at two")
    groups: list[int] = option([1, 4], "query heads a key head; the first at every length")
    rows: list[str] | None = option(None, "names of the rows to time; by default all")
    attention: bool = option(True, "time forward and backward by length")
    decode: bool = option(True, "time one token behind a cache")
    masks: bool = option(True, "time ALiBi, a window and packed documents")
    memory: bool = option(True, "measure peak memory too, on the CPU each in a process of its own")


@dataclass(kw_only=True)
class TrainingOptions(RunOptions):
    presets: list[str] | None = option(
        None, "sizes of the model; by default tiny and 71m, on a GPU 160m and 410m"
    )
    rows: list[str] | None = option(None, "names of the rows to time; by default all")
    memory: bool = option(True, "measure peak memory too, on the CPU in a process of its own")


@dataclass(kw_only=True)
class GenerationOptions(RunOptions):
    model: str = option(MISSING, "folder or hub name of a Transformers model")


Options = TypeVar("Options", bound=RunOptions)


def time_attention(options: AttentionOptions) -> None:
    """Time the attention against stock SDPA, the definition and what others offer."""
    device, options, end = _prepare(options)
    rows = _check(options, device)
    scope = plan.Scope(
        device.type, options.quick, _given(options.dtypes), options.lengths, options.head_dims,
        options.groups,
    )  # fmt: skip
    result = _begin("attention", device)
    print("times over the fastest stock SDPA in the same rounds, medians\n")

    for name, cells in (
        ("attention", plan.length_cells), ("decode", plan.decode_cells), ("masks", plan.mask_cells),
    ):  # fmt: skip
        if getattr(options, name):
            with _clock(result, name):
                result[name] = _time(list(cells(scope, rows)), name, result, end)
            _print(tables.timing_tables(result[name]))
            _keep(result, options.save, device)
    if options.memory and can_measure(device.type):
        with _clock(result, "memory"):
            result["memory"] = _memory(scope, {row.name for row in rows}, result, end)
        _print(tables.memory_table(result["memory"]))
    _report_checks(
        result, "outputs and gradients of every row timed are those of its definition in float64"
    )
    saved = _keep(result, options.save, device)
    if saved is not None:
        _save_figure(result, saved)
    _end(result)


def time_training(options: TrainingOptions) -> None:
    """Time training in our loop, the plain Trainer's, litgpt's and a bare one."""
    from stablemask.models.presets import PRESETS

    from .training import ROWS

    device, options, end = _prepare(options)
    for name, values, known in (
        ("presets", options.presets, PRESETS),
        ("rows", options.rows, ROWS),
    ):
        if values is not None and (not values or not set(values) <= set(known)):
            raise InputError(f"{name} must be of {', '.join(known)}, got {values}")
    result = _begin("training", device)
    with _clock(result, "training"):
        _training(options, device, result, end)
    _print(tables.training_table(result["training"]))
    _report_checks(
        result, "the loss and gradients of every row timed are those of its model in float64"
    )
    _keep(result, options.save, device)
    _end(result)


def time_generation(options: GenerationOptions) -> None:
    """Time generating with a Transformers model, with StableMask and without."""
    from stablemask.hf import load_model

    from .generation import measure_generation

    device, options, end = _prepare(options)
    result = {**_begin("generation", device), "generation": []}
    for dtype in _in_time(_given(options.dtypes), "generation", result, end):
        model = load_model(options.model, dtype=dtype, device=device)
        result["generation"] += measure_generation(model, quick=options.quick)
        _keep(result, options.save, device)
    _print(tables.generation_table(result["generation"]))
    print(strict_json.dumps(result))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _prepare(options: Options) -> tuple[torch.device, Options, float]:
    """Where to run; the options with what was left open; when the budget ends."""
    device = _device()
    options = _with_defaults(options, device.type)
    return device, options, time.monotonic() + _given(options.budget)


def _with_defaults(options: Options, device: str) -> Options:
    """What the user left open, by the device: on a GPU, what is most asked about and ends in time.

    Raises:
        InputError: the budget is not a number of seconds.
    """
    on_gpu = device == "cuda"
    if options.budget is not None and not options.budget > 0:
        raise InputError(f"budget must be above 0 seconds, got {options.budget}")
    defaults: dict[str, Any] = {
        "dtypes": ["bfloat16"] if on_gpu else ["float32", "bfloat16"],
        "presets": ["160m", "410m"] if on_gpu else ["tiny", "71m"],
        "budget": GPU_SECONDS if on_gpu else math.inf,
    }
    left_open = {
        name: value for name, value in defaults.items() if getattr(options, name, value) is None
    }
    return replace(options, **left_open)


def _given(value: Value | None) -> Value:
    """An option that :func:`_with_defaults` has filled in."""
    assert value is not None
    return value


def _begin(benchmark: str, device: torch.device) -> dict[str, Any]:
    result: dict[str, Any] = {"benchmark": benchmark, **describe(device)}
    result |= {"not_timed": [], "not_begun": {}, "share_of_tolerance": 0.0, "seconds": {}}
    print(f"{result['hardware']}; torch {torch.__version__}\n")
    return result


def _check(options: AttentionOptions, device: torch.device) -> list[Row]:
    for name in ("lengths", "head_dims", "groups"):
        values = getattr(options, name)
        if values is not None and (not values or min(values) < 1):
            raise InputError(f"{name} must be at least 1 each, got {values}")
    if options.lengths and min(options.lengths) < 2:
        raise InputError(f"lengths must be at least 2 each, got {options.lengths}")
    if any(HEADS % groups for groups in options.groups):
        raise InputError(f"groups must divide {HEADS} heads, got {options.groups}")
    dtypes = _given(options.dtypes)
    if not dtypes or not set(dtypes) <= set(DTYPES):
        raise InputError(f"dtypes must be of {', '.join(DTYPES)}, got {dtypes}")
    rows = all_rows(device.type)
    for row in options.rows or ():
        if row not in rows:
            raise InputError(f"no row {row!r}; the rows are {', '.join(rows)}")
    return [row for row in rows.values() if options.rows is None or row.name in options.rows]


def _time(
    cells: list[plan.Planned], name: str, result: dict[str, Any], end: float
) -> list[dict[str, Any]]:
    timings = []
    for case, rows, budget in _in_time(cells, name, result, end):
        cell = measure(case, rows, budget)
        timings += cell.timings
        result["not_timed"] += cell.not_timed
        result["share_of_tolerance"] = max(result["share_of_tolerance"], round(cell.worst, 3))
    return timings


def _memory(
    scope: plan.Scope, chosen: set[str], result: dict[str, Any], end: float
) -> list[dict[str, Any]]:
    """Peak MiB by length over the floor's, and under each mask over our own causal pass."""
    runs = []
    for case in plan.memory_cases(scope):
        rows = [
            row
            for row in MEMORY_ROWS
            if row in chosen and (row != "definition" or case.q_len <= MAX_DENSE_LENGTH)
        ]
        runs += [(row, case, "sdpa") for row in rows]
    if "stablemask" in chosen:
        runs += [("stablemask", case, "stablemask") for case in plan.mask_memory_cases(scope)]
    records, floors = [], {}
    for row, case, floor in _in_time(runs, "memory", result, end):
        mib = peak_memory(row, case)
        if row == floor and case.mask == "causal":
            floors[floor, case.dtype, case.kv_len] = mib
        base = floors.get((floor, case.dtype, case.kv_len))
        records.append(
            {
                "row": row, "computes": case.mask, "dtype": case.dtype, "kv_len": case.kv_len,
                "head_dim": case.head_dim, "groups": case.groups, "mib": mib,
                "over": floor, "ratio": round(mib / base, 3) if base else None,
            }
        )  # fmt: skip
    return records


def _training(
    options: TrainingOptions, device: torch.device, result: dict[str, Any], end: float
) -> None:
    from .training import BATCH_SIZES, ROWS, Workload, measure_training

    workloads = [
        Workload(
            preset, dtype, BATCH_SIZES[device.type][preset], device.type, device.type == "cuda"
        )
        for preset in _given(options.presets)
        for dtype in _given(options.dtypes)[: 1 if options.quick else None]
        if dtype
        != "float16"  # which wants its loss scaled, and nobody trains in where there is bfloat16
    ]
    result["training"] = []
    for workload in _in_time(workloads, "training", result, end):
        seconds = 5.0 if options.quick or device.type == "cuda" else 30.0
        measured = measure_training(
            workload, names=options.rows or tuple(ROWS), seconds=seconds, memory=options.memory
        )
        result["training"] += measured.rows
        result["not_timed"] += measured.not_timed
        result["share_of_tolerance"] = max(result["share_of_tolerance"], round(measured.worst, 3))
        _keep(result, options.save, device)


def _keep(result: dict[str, Any], folder: str | None, device: torch.device) -> Path | None:
    """Save what there is, after each part of a run, so that one that is cut off leaves what came before."""
    if folder is None:
        return None
    name = f"{result['benchmark']}-{device.type}-{result['date']}.json"
    return save_json(result, Path(folder) / name)


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


def _save_figure(result: dict[str, Any], path: Path) -> None:
    if result.get("attention") or result.get("decode"):
        try:
            from .figure import save_figure
        except ModuleNotFoundError as error:
            raise InputError(f"the figure needs {error.name}: {pip_install('report')}") from error
        save_figure(result, path.with_suffix(".png"))


def _report_checks(result: dict[str, Any], claim: str) -> None:
    if result["not_timed"]:
        _print(f"not timed:\n{tables.reasons(result['not_timed'])}")
    _print(f"correct: {claim}; the worst takes {result['share_of_tolerance']:.0%} of the tolerance")


def _end(result: dict[str, Any]) -> None:
    """The last line, and the exit code."""
    print(strict_json.dumps(result))
    wrong = sorted({record["row"] for record in result["not_timed"] if record["incorrect"]})
    if wrong:
        raise RunError(f"not what they claim to compute, see the report: {', '.join(wrong)}")


@contextmanager
def _clock(result: dict[str, Any], name: str) -> Iterator[None]:
    """Note how long a part of the benchmark takes."""
    start = time.perf_counter()
    yield
    result["seconds"][name] = round(time.perf_counter() - start, 1)


def _in_time(
    items: Sequence[Value], name: str, result: dict[str, Any], end: float
) -> Iterator[Value]:
    """Those that can begin before ``end``, with a bar; how many could not stands in the result."""
    for number, item in enumerate(progress_bar(items, desc=name, unit="cell", leave=False)):
        if time.monotonic() > end:
            result["not_begun"][name] = len(items) - number
            print(f"{name}: the budget is over with {len(items) - number} of {len(items)} to go")
            return
        yield item


def _print(text: str) -> None:
    print(f"{text}\n")
    sys.stdout.flush()
