"""What ``gpu.py`` runs on a GPU, part by part. A part leaves out the cases that its results know.

Timings are checked against the definition in float64 on the tensors that are
timed, in turn, medians, ratios to the fastest stock SDPA in the same rounds.
"""

import json
import re
import shlex
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stablemask.backends import hardware
from stablemask.models.devices import peak_flops

from . import gpu_contract
from .cases import Case, Inputs
from .environment import describe
from .measure import DECODE, FORWARD, TRAINING, measure
from .memory import peak_memory
from .rows import Row, Run, own_rows
from .timing import Budget

if TYPE_CHECKING:
    from .gpu import Results

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how long.

    Attributes:
        attention: sequences and tokens of each; ``width`` is heads times head_dim.
        caches: sequences, keys behind which one token is decoded, and query heads that share a key head.
        masked, live: sequences and tokens under a mask; tokens of the one whose peak memory is told.
        graphs: whether there are CUDA graphs.
        cell: seconds a pass, of which forward and backward take three times as many.
        batches, train: blocks in a step by preset, None for the benchmark's own; seconds for the ratio to softmax.
        pair: options of both pretraining runs; ``pair_steps`` where nothing tells how many there is time for.
        tests: files of tests; by default those that have one for a GPU.
    """

    device: str = "cuda"
    attention: Sequence[tuple[int, int]] = ((8, 2048), (2, 8192), (1, 2048), (1, 16384), (32, 512))
    head_dims: Sequence[int] = (64, 128)
    width: int = 1024
    caches: Sequence[tuple[int, int, int]] = (
        (1, 1024, 1), (1, 16384, 1), (8, 4096, 1), (64, 4096, 4),
    )  # fmt: skip
    masked: tuple[int, int] = (4, 4096)
    live: int = 16384
    graphs: bool = True
    cell: Budget = field(default_factory=lambda: Budget(0.4, min_rounds=5))
    batches: dict[str, int] | None = None
    train: float = 4.0
    pair: dict[str, Any] = field(default_factory=lambda: {"preset": "160m", "batch_size": 64})
    pair_steps: int = 200
    tests: Sequence[Path] = ()


GPU = Sizes()
MASKS = ("padding", "window", "documents", "alibi")
STOCK = ("sdpa", "sdpa flash", "sdpa cudnn", "sdpa efficient")
OURS = ("stablemask", "stablemask flash", "stablemask cudnn", "learned sink")


class LostError(Exception):
    """The GPU serves this process no more."""


def _lost(error: BaseException | str) -> bool:
    """After an illegal access every call of the process fails, with words like these."""
    return bool(
        re.search(r"CUDA error|device-side assert|CUDNN_STATUS_EXECUTION_FAILED", str(error))
    )


def contract(results: "Results", sizes: Sizes, seconds: float) -> None:
    """What machine this is; then every kernel, dtype and layout against float64."""
    device = torch.device(sizes.device)
    capability = hardware.capability(device)
    if not results.know("machine"):
        command = shlex.join(["python", "-m", "benchmarks", "gpu"])
        machine = {**describe(device), "command": command, "capability": capability}
        results.write("machine", **machine)
    for check in gpu_contract.checks(capability):
        if results.know(check.name):
            continue
        try:
            share = gpu_contract.error_of(check, sizes.device)
        except Exception as error:  # each kernel has errors of its own; one is a line, not the end
            results.write(check.name, ok=False, reason=_first_line(error))
            if _lost(error):
                raise LostError(check.name) from error
            continue
        results.write(check.name, ok=share <= 1, share_of_tolerance=round(share, 3))


def run_tests(results: "Results", sizes: Sizes, seconds: float, *, flex: bool) -> None:
    """The tests that need a GPU, file by file; FlexAttention's, which compile, are a part of their own."""
    import pytest

    for path in sizes.tests or gpu_tests():
        file = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
        if ("flex" in file) is flex and not results.know(file):
            recorder = Recorder(results, file)
            arguments = [str(path), "-m", "gpu", "-q", "--tb=no", "-p", "no:cacheprovider"]
            pytest.main(arguments, plugins=[recorder])
            recorder.tell(file)
            if recorder.lost:
                raise LostError(file)


def gpu_tests() -> list[Path]:
    """Test files with a test for a GPU, by their text; CUDA's own first."""
    asks = re.compile(r"marks\.gpu\b|^ *def test_\w+\([^)]*\bdevice\b", flags=re.M)
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if asks.search(path.read_text())]
    return sorted(files, key=lambda path: (path.name != "test_cuda.py", path))


class Recorder:
    """A plug-in of pytest: a line for each failure at once, and for each file the counts."""

    def __init__(self, results: "Results", file: str) -> None:
        self._results, self._file = results, file
        self._counts: Counter[str] = Counter()
        self.lost = False

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or not report.passed:
            self._note(report)
            if self._counts.total() % 50 == 0:
                self.tell(f"{self._file}, so far")

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._note(report)

    def tell(self, case: str) -> None:
        self._results.write(case, counts=dict(self._counts))

    def _note(self, report: Any) -> None:
        import pytest

        self._counts[report.outcome] += 1
        if report.failed:
            lines = [line for line in report.longreprtext.splitlines() if line.startswith("E  ")]
            reason = (lines or report.longreprtext.splitlines()[-1:] or [""])[0]
            self._results.write(report.nodeid, failed=reason.lstrip("E ")[:300])
            if _lost(report.longreprtext):
                self.lost = True
                pytest.exit("the GPU serves this process no more")


def attention(results: "Results", sizes: Sizes, seconds: float) -> None:
    """Forward, and forward and backward, by length."""
    for (batch, length), head_dim in product(sizes.attention, sizes.head_dims):
        heads = sizes.width // head_dim
        case = Case(sizes.device, "bfloat16", batch, length, length, head_dim, heads=heads)
        _time(results, sizes, f"{batch} x {length}, head_dim {head_dim}", case, (*STOCK[:3], *OURS))


def decode(results: "Results", sizes: Sizes, seconds: float) -> None:
    """One token behind a cache, launch by launch and as a CUDA graph."""
    for batch, keys, groups in sizes.caches:
        case = Case(sizes.device, "bfloat16", batch, 1, keys, groups=groups)
        name = f"{batch} x {keys}" + (f", {groups} query heads a key head" if groups > 1 else "")
        names = ("sdpa", "stablemask", "learned sink")
        _time(results, sizes, name, case, names)
        if sizes.graphs:
            _time(results, sizes, f"{name}, in a CUDA graph", case, names, change=graphed)


def masks(results: "Results", sizes: Sizes, seconds: float) -> None:
    """Under each mask, over stock SDPA given the same one dense; then peak memory."""
    batch, length = sizes.masked
    for mask in MASKS:
        case = Case(sizes.device, "bfloat16", batch, length, length, mask=mask)
        _time(
            results, sizes, f"{mask}, {batch} x {length}", case, ("sdpa", *STOCK[2:], "stablemask")
        )
    for mask, row in product(("causal", *MASKS), ("sdpa", "stablemask", "learned sink")):
        name = f"memory, {mask}, {row}"
        if not results.know(name) and (mask == "causal" or row != "learned sink"):
            case = Case(sizes.device, "bfloat16", 1, sizes.live, sizes.live, mask=mask)
            try:
                facts: dict[str, Any] = {"mib": peak_memory(row, case)}
            except Exception as error:
                if _lost(error):
                    raise LostError(name) from error
                facts = {"reason": _first_line(error)}
            results.write(name, row=row, mask=mask, kv_len=sizes.live, **facts)


def flex(results: "Results", sizes: Sizes, seconds: float) -> None:
    """FlexAttention, compiled: its times under masks, then its tests."""
    batch, length = sizes.masked
    for mask in MASKS:
        case = Case(sizes.device, "bfloat16", batch, length, length, mask=mask)
        _time(results, sizes, f"{mask}, {batch} x {length}", case, ("sdpa", "stablemask flex"))
    run_tests(results, sizes, seconds, flex=True)


def graphed(row: Row) -> Row:
    """The same in a CUDA graph, whose launches cost nothing on the host."""

    def build(case: Case, inputs: Inputs) -> Run:
        run = row.build(case, inputs)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what a first call sets up cannot be captured
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()

        def replay() -> torch.Tensor:
            graph.replay()
            return out

        return replay

    return replace(row, build=build)


def _time(
    results: "Results", sizes: Sizes, name: str, case: Case, names: Sequence[str],
    change: Callable[[Row], Row] = lambda row: row,
) -> None:  # fmt: skip
    if results.know(name):
        return
    rows = [change(row) for row in own_rows(case.device) if row.name in names]
    cell = measure(case, rows, sizes.cell)
    kept = ("row", "pass", "ms", "ratio", "quartiles", "samples")
    for timing in cell.rows:
        facts = {key: timing[key] for key in kept}
        results.write(name, **facts, **_speed(case, timing["pass"], timing["ms"]))
    for skipped in cell.not_timed:
        results.write(name, **{key: skipped[key] for key in ("row", "pass", "reason", "incorrect")})
        if _lost(skipped["reason"]):
            raise LostError(name)
    if case.device == "cuda":
        torch.cuda.empty_cache()


def _speed(case: Case, kind: str, ms: float) -> dict[str, float]:
    """TFLOP/s of a causal pass, a half of all scores; the backward has five products where it has two."""
    if kind == DECODE or case.mask != "causal":
        return {}
    scores = case.batch * case.heads * case.q_len * case.kv_len / 2
    flops = 4 * scores * case.head_dim * {FORWARD: 1, TRAINING: 3.5}[kind]
    found = {"tflops": round(flops / ms / 1e9, 1)}
    peak = peak_flops(torch.device(case.device), case.torch_dtype)
    return found if peak is None else {**found, "of_peak": round(flops / ms * 1e3 / peak, 3)}


def train(results: "Results", sizes: Sizes, seconds: float, *, preset: str, compiled: bool) -> None:
    """Whole training loops: ours with either attention, Llama on the plain Trainer, plain PyTorch."""
    from .training import BATCH_SIZES, Workload, measure_training

    case = f"{preset}, compiled" if compiled else preset
    if results.know(case):
        return
    batch = (sizes.batches or BATCH_SIZES["cuda"])[preset]
    workload = Workload(preset, "bfloat16", batch, sizes.device, compiled)
    rows = ("stablemask", "softmax", "plain", "llama")
    measured = measure_training(workload, names=rows, seconds=sizes.train, memory=True)
    for row in (*measured.rows, *measured.not_timed):
        results.write(case, **row)


def pair(results: "Results", sizes: Sizes, seconds: float) -> None:
    """The same model with StableMask and with softmax, on Python's sources, as far as the time goes."""
    from stablemask.training.assembly import METRICS_FILE
    from stablemask.training.pretrain import pretrain
    from stablemask.training.pretrain_options import PretrainOptions

    begun = [row["steps"] for row in results.of() if "steps" in row]
    steps = begun[0] if begun else _steps_in(seconds, results, sizes)
    for attention in ("stablemask", "softmax"):
        if results.know(attention):
            continue
        with tempfile.TemporaryDirectory() as folder:
            options = PretrainOptions(
                **sizes.pair, attention=attention, steps=steps, out=f"{folder}/run",
                dtype="bfloat16", save_every=steps, tensorboard=False,
            )  # fmt: skip
            run = pretrain(options)
            lines = (run.folder / METRICS_FILE).read_text().splitlines()
        logs = [json.loads(line) for line in lines]
        curve = [[log["step"], log["eval_loss"]] for log in logs if "eval_loss" in log]
        speeds = [log["tokens_per_second"] for log in logs if "tokens_per_second" in log]
        results.write(
            attention, preset=sizes.pair["preset"], steps=steps, batch=sizes.pair["batch_size"],
            perplexity=run.perplexity, evaluations=curve, tokens_per_second=speeds[-1:],
        )  # fmt: skip


def _steps_in(seconds: float, results: "Results", sizes: Sizes) -> int:
    """Of each of the two runs, by the speed that was measured; a minute goes to the data and evaluations."""
    measured = [
        row for row in results.of("train-160m") if row.get("row") == "stablemask" and "batch" in row
    ]
    if not measured:
        return sizes.pair_steps
    rate = measured[-1]["tokens_per_second"] / (sizes.pair["batch_size"] * measured[-1]["context"])
    return max(20, int(rate * (seconds - 60) / 2))


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


PARTS: dict[str, Callable[["Results", Sizes, float], None]] = {
    "contract": contract,
    "tests": partial(run_tests, flex=False),
    "attention": attention,
    "decode": decode,
    "train-160m": partial(train, preset="160m", compiled=False),
    "masks": masks,
    "train-410m": partial(train, preset="410m", compiled=False),
    "train-160m-compiled": partial(train, preset="160m", compiled=True),
    "pair-160m": pair,
    "train-410m-compiled": partial(train, preset="410m", compiled=True),
    "flex": flex,
}
