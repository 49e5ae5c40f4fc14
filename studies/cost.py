"""What StableMask costs, read from the newest files of ``python -m benchmarks``; nothing is timed here."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.figure import LABELS, RATIO_TICKS, STYLES
from stablemask.errors import InputError
from stablemask.reading import parse_json
from stablemask.report.drawing import COLORS

from .kinds import line_style
from .page import table
from .study import Claim, Job, Record, Section, Study, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = "benchmarks/results"
COMMANDS = " and ".join(
    f"`python -m benchmarks {name} --save {RESULTS}`" for name in ("attention", "training")
)
# Where less is computed than this, a call's overhead shows.
SHORTEST = 1024
# What is above or below stock attention by less is within the noise of a benchmark.
MOST_TIME, MOST_MEMORY, LEAST_SPEED = 1.05, 1.05, 0.98

_FILE = re.compile(r"(attention|training|generation)-(\w+)-(\d{4}-\d{2}-\d{2})\.json")
_KEPT = ("benchmark", "date", "command", "hardware")
# What the other rows compute, which gives them their colours here.
_OTHERS = {
    "definition": "stablemask",
    "softmax-n flash": "softmax1",
    "softmax-n slow": "softmax1",
    "x-transformers": "learned-sink",
    "gpt-oss eager": "learned-sink",
    "flex lse": "learned-sink",
    "flex zero key": "learned-sink",
}
_SDPA = "softmax, stock SDPA"
_TITLES = {"ratio": "forward and backward", "mib": "peak memory"}
_TRAINING_ROWS = {
    "stablemask": "ours, StableMask",
    "softmax": "ours, softmax",
    "llama": "Transformers' Llama, its Trainer",
    "litgpt": "litgpt",
    "plain": "plain PyTorch",
}


def newest(folder: Path) -> dict[str, str]:
    """The last file of each benchmark and type of device, with a digest of what it holds."""
    found = sorted(
        (match[3], match[1], match[2], path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _FILE.fullmatch(path.name))
    )
    last = {(benchmark, device): path for _, benchmark, device, path in found}
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for _, path in sorted(last.items())
    }


def read(work: Path, results: str, files: dict[str, str]) -> dict[str, Any]:
    """What the section tells of the files named in ``files``.

    Raises:
        InputError: there is no file of the attention benchmark, or a damaged one.
    """
    if not any(name.startswith("attention") for name in files):
        raise InputError(
            f"no measurements of the attention in {results}; make them with {COMMANDS}, or go "
            "where there are some"
        )
    measured = []
    for name in files:
        path = Path(results, name)
        try:
            result = parse_json(path.read_bytes())
            kept = {key: result[key] for key in _KEPT} | {"torch": result["versions"]["torch"]}
            kept["device"] = _FILE.fullmatch(name)[2]  # type: ignore[index]
            kept |= _PARTS[result["benchmark"]](result)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path} is not a result of this version's benchmark ({error!r}); make it anew with "
                f"{COMMANDS}"
            ) from error
        measured.append(kept)
    return {"measured": measured}


def jobs(scale: str, seeds: int) -> list[Job]:
    return [Job("benchmarks", read, {"results": RESULTS, "files": newest(Path(RESULTS))})]


def section(records: list[Record]) -> Section:
    measured = [part for record in records for part in record["measured"]]
    attention, training, generation = (
        [part for part in measured if part["benchmark"] == name] for name in _PARTS
    )
    attention = [part for part in attention if part["time"] or part["memory"]]
    figures = {}
    body = [
        "Ratios are to `F.scaled_dot_product_attention(is_causal=True)`, the fastest of its kernels, in "
        "the same rounds. Every row was checked against float64 on the tensors that were timed. A claim "
        "holds where it does in every precision and shape and on every kind of device: attention, from "
        f"{SHORTEST:,} tokens on, in at most {MOST_TIME:.2f} of the time and {MOST_MEMORY:.2f} of the peak "
        f"memory; training and generating at {LEAST_SPEED:.2f} of the speed or more. Partly, where it "
        "does in some."
    ]
    for part in attention:
        name = part["device"]
        figures[name] = (
            _figure(part),
            f"Time of forward and backward, and peak memory, by sequence length on {part['hardware']}",
        )
        body += [_origin(part), f"{{{name}}}", _time_text(part), _memory_text(part)]
    body += [text for part in training for text in (_origin(part), _training_text(part))]
    body += [text for part in generation for text in (_origin(part), _generation_text(part))]
    return Section(
        _claims(attention, training, generation), "\n\n".join(filter(None, body)), figures
    )


STUDY = Study("cost", "Cost", jobs, section)


def _claims(
    attention: list[Record], training: list[Record], generation: list[Record]
) -> list[Claim]:
    time = [record["ratio"] for part in attention for record in _long(part["time"])]
    memory = [record["ratio"] for part in attention for record in _long(part["memory"])]
    dense = [record["ratio"] for part in attention for record in _long(part["time"], "definition")]
    trained = [
        r["of_softmax"] for part in training for r in part["rows"] if r["row"] == "stablemask"
    ]
    generated = [r["of_sdpa"] for part in generation for r in part["rows"]]
    fast = [ratio <= MOST_TIME for ratio in time]
    small = [ratio <= MOST_MEMORY for ratio in memory]
    time_text = f"forward + backward {_range(time)} of stock SDPA's time"
    claims = [
        Claim(
            "It integrates easily with existing attention optimisation (FlashAttention).",
            f"{time_text}, peak memory {_range(memory)}; the formula as "
            f"written, dense: {_range(dense, 1)} of the time",
            verdict([*fast, *small] if small else []),
        ),
        Claim(
            "It costs nothing in training.",
            f"{time_text}; training {_range(trained)} of softmax's tokens per second",
            verdict([*fast, *(speed >= LEAST_SPEED for speed in trained)] if trained else []),
        ),
    ]
    if generated:
        claims.append(
            Claim(
                "It costs nothing in generating (a question of ours).",
                f"{_range(generated)} of stock SDPA's tokens per second",
                verdict([speed >= LEAST_SPEED for speed in generated]),
            )
        )
    return claims


def _range(values: Sequence[float], digits: int = 2) -> str:
    if not values:
        return "(not measured)"
    low, high = (f"{value:.{digits}f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _long(records: Iterable[Record], row: str = "stablemask") -> list[Record]:
    return [r for r in records if r["row"] == row and r["kv_len"] >= SHORTEST]


def _keep(records: Iterable[Record], *keys: str) -> list[Record]:
    return [{key: record[key] for key in keys} for record in records]


def _attention(result: dict[str, Any]) -> dict[str, Any]:
    time = [
        record
        for record in result.get("attention", ())
        if record["pass"] == "forward+backward"
        and (record["row"] == "stablemask" or record["row"] in _OTHERS)
        and record["ratio"] is not None
    ]
    memory = [record for record in result.get("memory", ()) if record["over"] == "sdpa"]
    return {
        "time": _keep(time, "row", "dtype", "kv_len", "head_dim", "groups", "ratio"),
        "memory": _keep(memory, "row", "dtype", "kv_len", "mib", "ratio"),
    }


def _training(result: dict[str, Any]) -> dict[str, Any]:
    rows = [
        record
        for record in result["training"]
        if record["row"] in _TRAINING_ROWS and record["of_softmax"] is not None
    ]
    kept = ("row", "preset", "dtype", "tokens_per_second", "of_softmax", "of_best_other", "mib")
    return {"rows": _keep(rows, *kept)}


def _generation(result: dict[str, Any]) -> dict[str, Any]:
    rows = [
        record
        for record in result["generation"]
        if record["row"] == "stablemask" and record["of_sdpa"] is not None
    ]
    kept = (
        "dtype",
        "batch",
        "prompt",
        "tokens_per_second",
        "of_sdpa",
        "prompt_ms",
        "prompt_of_sdpa",
    )
    return {"rows": _keep(rows, *kept)}


_PARTS = {"attention": _attention, "training": _training, "generation": _generation}


def _origin(part: Record) -> str:
    return (
        f"**{part['benchmark'].capitalize()}**: `{_command(part)}`, {part['date']}, "
        f"{part['hardware']}, PyTorch {part['torch']}."
    )


def _command(part: Record) -> str:
    """As it is given today; files of before the benchmarks left the package have its old name."""
    now = f"python -m benchmarks {part['benchmark']}"
    return re.sub(r"^stablemask bench( --train)?", now, part["command"])


def _main_shape(records: list[Record]) -> list[Record]:
    """Those of the first head_dim and group, which are measured at every length."""
    shape = [(record["head_dim"], record["groups"]) for record in records]
    return [record for record, its in zip(records, shape) if its == shape[0]]


def _by_length(records: list[Record], digits: int, field: str, rows: Iterable[str]) -> str:
    lengths = sorted({record["kv_len"] for record in records})
    dtypes = dict.fromkeys(record["dtype"] for record in records)
    cells = {(r["dtype"], r["row"], r["kv_len"]): f"{r[field]:,.{digits}f}" for r in records}
    lines = [
        [_label(row), dtype, *(cells.get((dtype, row, length), "") for length in lengths)]
        for row, dtype in product(rows, dtypes)
        if any((dtype, row, length) in cells for length in lengths)
    ]
    return table(["", "", *(f"{length:,}" for length in lengths)], lines)


def _time_text(part: Record) -> str:
    if not part["time"]:
        return ""
    main = _main_shape(part["time"])
    others = [record["ratio"] for record in _long(part["time"]) if record not in main]
    text = (
        f"Forward and backward, time over stock SDPA's by tokens, heads of {main[0]['head_dim']}:\n\n"
        f"{_by_length(main, 2, 'ratio', ('stablemask', *_OTHERS))}"
    )
    if others:
        text += f"\n\nStableMask with other sizes or groups of heads: {_range(others)}."
    return text


def _memory_text(part: Record) -> str:
    if not part["memory"]:
        return ""
    return (
        "Peak memory of one sequence above its inputs, MiB, by tokens:\n\n"
        f"{_by_length(part['memory'], 1, 'mib', ('sdpa', 'stablemask', 'definition'))}"
    )


def _training_text(part: Record) -> str:
    rows = [
        [
            f"{record['preset']}, {record['dtype']}",
            _TRAINING_ROWS[record["row"]],
            f"{record['tokens_per_second']:,.0f}",
            *(
                "" if record[key] is None else f"{record[key]:.3f}"
                for key in ("of_softmax", "of_best_other")
            ),
            "" if record["mib"] is None else f"{record['mib']:,.0f}",
        ]
        for record in part["rows"]
    ]
    return table(["", "", "tokens/s", "of our softmax", "of the best other", "peak MiB"], rows)


def _generation_text(part: Record) -> str:
    rows = [
        [
            f"{record['batch']} x {record['prompt']:,} tokens",
            record["dtype"],
            f"{record['tokens_per_second']:,.1f}",
            f"{record['of_sdpa']:.3f}",
            f"{record['prompt_ms']:,.0f}",
            f"{record['prompt_of_sdpa']:.3f}",
        ]
        for record in part["rows"]
    ]
    speed = "of stock SDPA's speed"
    return table(["prompts", "", "tokens/s", speed, "prompt, ms", speed], rows)


def _figure(part: Record) -> Figure:
    """Time on the upper row, peak memory on the lower, a column a dtype."""
    panels = {"ratio": _main_shape(part["time"]), "mib": part["memory"]}
    panels = {field: records for field, records in panels.items() if records}
    dtypes = list(dict.fromkeys(r["dtype"] for records in panels.values() for r in records))
    figure = Figure((4.8 * len(dtypes), 3.2 * len(panels) + 1.4), layout="constrained")
    grid = figure.subplots(len(panels), len(dtypes), squeeze=False, sharey="row")
    handles: dict[str, Any] = {}
    for (field, records), line in zip(panels.items(), grid):
        for dtype, axes in zip(dtypes, line):
            of_dtype = [record for record in records if record["dtype"] == dtype]
            _draw_lines(axes, of_dtype, field, handles)
            axes.set(title=f"{_TITLES[field]}, {dtype}", xlabel="sequence length (tokens)")
        if field == "ratio":
            _scale_ratios(line[0], [record["ratio"] for record in records])
        else:
            line[0].set(ylabel="peak memory (MiB)", yscale="log")
            line[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            line[0].yaxis.set_major_formatter("{x:,g}")
            line[0].yaxis.set_minor_locator(NullLocator())
    figure.suptitle(f"{part['hardware']}; PyTorch {part['torch']}", fontsize="medium")
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2)
    return figure


def _draw_lines(axes: Axes, records: list[Record], field: str, handles: dict[str, Any]) -> None:
    styles: dict[str, Any] = {
        "sdpa": line_style("softmax"),
        "stablemask": line_style("stablemask"),
        **{
            row: {"color": COLORS[kind], "marker": STYLES[row][1], "ls": STYLES[row][2]}
            for row, kind in _OTHERS.items()
        },
    }
    lengths = sorted({record["kv_len"] for record in records})
    if field == "ratio":
        handles[_SDPA] = axes.axhline(1, color=styles["sdpa"]["color"])
    for row, style in styles.items():
        points = sorted((r["kv_len"], r[field]) for r in records if r["row"] == row)
        if points:
            (handles[_label(row)],) = axes.plot(*zip(*points), **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())


def _scale_ratios(axes: Axes, ratios: list[float]) -> None:
    low, high = min(0.9, 0.95 * min(ratios)), max(1.3, 1.2 * max(ratios))
    ticks = [tick for tick in RATIO_TICKS if low <= tick <= high]
    axes.set(yscale="log", ylim=(low, high), ylabel="time / time of stock SDPA")
    axes.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.yaxis.set_minor_locator(NullLocator())


def _label(row: str) -> str:
    return _SDPA if row == "sdpa" else LABELS[row]
