"""The commands that time attention, training and generation, and what their runs have in common.

Every row is first checked against the definition in float64; ratios are to stock SDPA in the same rounds.
"""

import math
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
from .environment import describe, save_json
from .measure import Measured, measure
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
    options = _with_defaults(options)
    rows = _check(options)
    run = _Run("attention", options)
    scope = plan.Scope(
        run.device, options.quick, options.dtypes or [], options.lengths, options.head_dims,
        options.groups,
    )  # fmt: skip
    print("times over the fastest stock SDPA in the same rounds, medians\n")
    for name, cells in (
        ("attention", plan.length_cells), ("decode", plan.decode_cells), ("masks", plan.mask_cells),
    ):  # fmt: skip
        if getattr(options, name):
            with run.part(name) as records:
                for case, served, budget in run.in_time(name, list(cells(scope, rows))):
                    run.add(records, measure(case, served, budget))
            _print(tables.timing_tables(records))
    if options.memory and can_measure(run.device):
        with run.part("memory") as records:
            _memory(run, scope, {row.name for row in rows}, records)
        _print(tables.memory_table(records))
    if run.path is not None:
        _save_figure(run.result, run.path)
    run.finish("outputs and gradients of every row timed are those of its definition in float64")


def time_training(options: TrainingOptions) -> None:
    """Time training in our loop, the plain Trainer's, litgpt's and a bare one."""
    from stablemask.models.presets import PRESETS

    from .training import BATCH_SIZES, ROWS, Workload, measure_training

    options = _with_defaults(options)
    for name, values, known in (
        ("presets", options.presets, PRESETS),
        ("rows", list(ROWS) if options.rows is None else options.rows, ROWS),
    ):
        if not values or not set(values) <= set(known):
            raise InputError(f"{name} must be of {', '.join(known)}, got {values}")
    run = _Run("training", options)
    on_gpu = run.device == "cuda"
    workloads = [
        Workload(preset, dtype, BATCH_SIZES[run.device][preset], run.device, on_gpu)
        for preset in options.presets or ()
        for dtype in (options.dtypes or [])[: 1 if options.quick else None]
        # float16 wants its loss scaled, and nobody trains in it where there is bfloat16
        if dtype != "float16"
    ]
    seconds = 5.0 if options.quick or on_gpu else 30.0
    with run.part("training") as records:
        for workload in run.in_time("training", workloads):
            measured = measure_training(
                workload, names=options.rows or tuple(ROWS), seconds=seconds, memory=options.memory
            )
            run.add(records, measured)
    _print(tables.training_table(records))
    run.finish("the loss and gradients of every row timed are those of its model in float64")


def time_generation(options: GenerationOptions) -> None:
    """Time generating with a Transformers model, with StableMask and without."""
    from stablemask.hf import load_model

    from .generation import measure_generation

    options = _with_defaults(options)
    run = _Run("generation", options)
    with run.part("generation") as records:
        for dtype in run.in_time("generation", options.dtypes or []):
            model = load_model(options.model, dtype=dtype, device=run.device)
            records += measure_generation(model, quick=options.quick)
    _print(tables.generation_table(records))
    print(strict_json.dumps(run.result))


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _with_defaults(options: Options) -> Options:
    """What the user left open, by the device: on a GPU, what is most asked about and ends in time.

    Raises:
        InputError: the budget is not a number of seconds.
    """
    on_gpu = _device() == "cuda"
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


def _check(options: AttentionOptions) -> list[Row]:
    for name in ("lengths", "head_dims", "groups"):
        values = getattr(options, name)
        if values is not None and (not values or min(values) < 1):
            raise InputError(f"{name} must be at least 1 each, got {values}")
    if options.lengths and min(options.lengths) < 2:
        raise InputError(f"lengths must be at least 2 each, got {options.lengths}")
    if any(HEADS % groups for groups in options.groups):
        raise InputError(f"groups must divide {HEADS} heads, got {options.groups}")
    if not options.dtypes or not set(options.dtypes) <= set(DTYPES):
        raise InputError(f"dtypes must be of {', '.join(DTYPES)}, got {options.dtypes}")
    rows = all_rows(_device())
    for row in options.rows or ():
        if row not in rows:
            raise InputError(f"no row {row!r}; the rows are {', '.join(rows)}")
    return [row for row in rows.values() if options.rows is None or row.name in options.rows]


class _Run:
    """What a benchmark has found, kept after each of its parts, so that one that is cut off leaves those before.

    Attributes:
        path: of the file that it is kept in, if any.
    """

    def __init__(self, benchmark: str, options: RunOptions) -> None:
        self.device = _device()
        assert options.budget is not None
        self._end = time.monotonic() + options.budget
        self.result: dict[str, Any] = {
            "benchmark": benchmark,
            **describe(torch.device(self.device)),
        }
        self.result |= {"not_timed": [], "not_begun": {}, "share_of_tolerance": 0.0, "seconds": {}}
        name = f"{benchmark}-{self.device}-{self.result['date']}.json"
        self.path = None if options.save is None else Path(options.save) / name
        print(f"{self.result['hardware']}; torch {torch.__version__}\n")

    @contextmanager
    def part(self, name: str) -> Iterator[list[dict[str, Any]]]:
        """The list of its records, to be filled; how long that takes is noted."""
        start = time.perf_counter()
        records: list[dict[str, Any]] = []
        self.result[name] = records
        yield records
        self.result["seconds"][name] = round(time.perf_counter() - start, 1)
        self.keep()

    def in_time(self, name: str, items: Sequence[Value]) -> Iterator[Value]:
        """Those that can begin within the budget, with a bar; how many could not stands in the result."""
        for number, item in enumerate(progress_bar(items, desc=name, unit="cell", leave=False)):
            if time.monotonic() > self._end:
                left = self.result["not_begun"][name] = len(items) - number
                print(f"{name}: the budget is over with {left} of {len(items)} to go")
                return
            yield item
            self.keep()

    def add(self, records: list[dict[str, Any]], measured: Measured) -> None:
        records += measured.rows
        self.result["not_timed"] += measured.not_timed
        worst = max(self.result["share_of_tolerance"], round(measured.worst, 3))
        self.result["share_of_tolerance"] = worst

    def keep(self) -> None:
        if self.path is not None:
            save_json(self.result, self.path)

    def finish(self, claim: str) -> None:
        """What was left out, how right the rest is, the last line, and the exit code."""
        not_timed, share = self.result["not_timed"], self.result["share_of_tolerance"]
        if not_timed:
            _print(f"not timed:\n{tables.reasons(not_timed)}")
        _print(f"correct: {claim}; the worst takes {share:.0%} of the tolerance")
        print(strict_json.dumps(self.result))
        if wrong := sorted({record["row"] for record in not_timed if record["incorrect"]}):
            raise RunError(f"not what they claim to compute, see the report: {', '.join(wrong)}")


def _memory(run: _Run, scope: plan.Scope, chosen: set[str], records: list[dict[str, Any]]) -> None:
    """Peak MiB by length over the floor's, and under each mask over our own causal pass."""
    runs = [
        (row, case, "sdpa")
        for case in plan.memory_cases(scope)
        for row in MEMORY_ROWS
        if row in chosen and (row != "definition" or case.q_len <= MAX_DENSE_LENGTH)
    ]
    if "stablemask" in chosen:
        runs += [("stablemask", case, "stablemask") for case in plan.mask_memory_cases(scope)]
    floors: dict[tuple, float] = {}
    for row, case, floor in run.in_time("memory", runs):
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


def _save_figure(result: dict[str, Any], path: Path) -> None:
    try:
        from .figure import save_figure
    except ModuleNotFoundError as error:
        raise InputError(f"the figure needs {error.name}: {pip_install('report')}") from error
    save_figure(result, path.with_suffix(".png"))


def _print(text: str) -> None:
    print(f"{text}\n", flush=True)
