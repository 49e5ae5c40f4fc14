"""What StableMask costs, read from the newest files of ``python -m benchmarks``; nothing is timed here."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.figure import LINES, SDPA, Panels, draw
from benchmarks.tables import pivot, records_table
from stablemask.errors import InputError
from stablemask.reading import parse_json

from .study import Claim, Job, Record, Section
from .tables import joined

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
# Whose times are told: StableMask's, and others'.
_ROWS = tuple(row for row in LINES if row not in (SDPA, "learned sink"))
_SOURCE = (
    ("measured", "{benchmark}"), ("date", "{date}"), ("machine", "{hardware}"),
    ("PyTorch", "{torch}"), ("command", "`{command}`"),
)  # fmt: skip
_TRAINED = (
    ("", "{device}, {preset}, {dtype}"), ("", "{name}"), ("tokens/s", "{tokens_per_second:,.0f}"),
    ("of our softmax", "{of_softmax:.3f}"), ("of the best other", "{of_best_other:.3f}"),
    ("peak MiB", "{mib:,.0f}"),
)  # fmt: skip
_GENERATED = (
    ("prompts", "{device}, {batch} x {prompt:,} tokens"), ("", "{dtype}"),
    ("tokens/s", "{tokens_per_second:,.1f}"), ("of stock SDPA's speed", "{of_sdpa:.3f}"),
    ("prompt, ms", "{prompt_ms:,.0f}"), ("of stock SDPA's speed", "{prompt_of_sdpa:.3f}"),
)  # fmt: skip
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
    timed, held = ([part for part in attention if part[what]] for what in ("time", "memory"))
    drawn = [part for part in attention if part["time"] or part["memory"]]
    return Section(
        _claims(attention, training, generation),
        {
            "sources": records_table(
                ({**part, "command": _command(part)} for part in (*drawn, *training, *generation)),
                _SOURCE,
            ),
            "time": joined(map(_time_table, timed)),
            "shapes": joined(filter(None, map(_shapes_table, timed))),
            "memory": joined(map(_memory_table, held)),
            "training": joined(records_table(_rows(part), _TRAINED) for part in training),
            "generation": joined(records_table(_rows(part), _GENERATED) for part in generation),
        },
        {part["device"]: draw(*_figure(part)) for part in drawn},
        {
            "devices": {part["device"]: part["hardware"] for part in drawn},
            "shortest": f"{SHORTEST:,}",
            "most_time": MOST_TIME,
            "most_memory": MOST_MEMORY,
            "least_speed": LEAST_SPEED,
        },
    )


def _claims(
    attention: list[Record], training: list[Record], generation: list[Record]
) -> list[Claim]:
    time, memory = (
        [record["ratio"] for part in attention for record in _long(part[what])]
        for what in ("time", "memory")
    )
    trained = [
        r["of_softmax"] for part in training for r in part["rows"] if r["row"] == "stablemask"
    ]
    generated = [r["of_sdpa"] for part in generation for r in part["rows"]]
    fast = [ratio <= MOST_TIME for ratio in time]
    small = [ratio <= MOST_MEMORY for ratio in memory]
    quick, generates = (
        [speed >= LEAST_SPEED for speed in speeds] for speeds in (trained, generated)
    )
    found = {
        "It integrates easily with existing attention optimisation (FlashAttention).": (
            [*fast, *small] if small else []
        ),
        "It costs nothing in training.": [*fast, *quick] if quick else [],
    }
    if generates:
        found["It costs nothing in generating (a question of ours)."] = generates
    return [Claim(statement, holds) for statement, holds in found.items()]


def _long(records: Iterable[Record]) -> list[Record]:
    return [r for r in records if r["row"] == "stablemask" and r["kv_len"] >= SHORTEST]


def _keep(records: Iterable[Record], *keys: str) -> list[Record]:
    return [{key: record[key] for key in keys} for record in records]


def _attention(result: dict[str, Any]) -> dict[str, Any]:
    time = [
        record
        for record in result.get("attention", ())
        if record["pass"] == "forward+backward"
        and record["row"] in _ROWS
        and record["ratio"] is not None
    ]
    memory = [record for record in result.get("memory", ()) if record["over"] == "sdpa"]
    return {
        "time": _keep(time, "row", "dtype", "kv_len", "head_dim", "groups", "ratio"),
        "memory": _keep(memory, "row", "dtype", "kv_len", "mib", "ratio"),
    }


def _training(result: dict[str, Any]) -> dict[str, Any]:
    rows = [r for r in result["training"] if r["row"] in _TRAINING_ROWS and r["of_softmax"]]
    kept = ("row", "preset", "dtype", "tokens_per_second", "of_softmax", "of_best_other", "mib")
    return {"rows": _keep(rows, *kept)}


def _generation(result: dict[str, Any]) -> dict[str, Any]:
    rows = [r for r in result["generation"] if r["row"] == "stablemask" and r["of_sdpa"]]
    kept = "dtype batch prompt tokens_per_second of_sdpa prompt_ms prompt_of_sdpa"
    return {"rows": _keep(rows, *kept.split())}


_PARTS = {"attention": _attention, "training": _training, "generation": _generation}


def _rows(part: Record) -> list[Record]:
    return [
        {**row, "device": part["device"], "name": _TRAINING_ROWS.get(row.get("row", ""))}
        for row in part["rows"]
    ]


def _command(part: Record) -> str:
    """As it is given today; files of before the benchmarks left the package have its old name."""
    now = f"python -m benchmarks {part['benchmark']}"
    return re.sub(r"^stablemask bench( --train)?", now, part["command"])


def _main_shape(records: list[Record]) -> list[Record]:
    """Those of the first head_dim and group, which are measured at every length."""
    shape = [(record["head_dim"], record["groups"]) for record in records]
    return [record for record, its in zip(records, shape) if its == shape[0]]


def _by_length(head: str, records: list[Record], label: str, cell: str) -> str:
    """A row for each label and precision, a column for each length; ``label`` and ``cell`` are formats."""

    def names(record: Any) -> list[str]:
        return [label.format_map(record), record["dtype"]]

    return pivot([head, ""], records, names, "kv_len", cell.format_map)


def _in_order(records: list[Record], rows: Iterable[str]) -> list[Record]:
    return [r | {"name": LINES[row].label} for row in rows for r in records if r["row"] == row]


def _time_table(part: Record) -> str:
    main = _in_order(_main_shape(part["time"]), _ROWS)
    head = f"{part['device']}, heads of {main[0]['head_dim']}"
    return _by_length(head, main, "{name}", "{ratio:.2f}")


def _shapes_table(part: Record) -> str:
    """StableMask in the other shapes."""
    main = _main_shape(part["time"])
    others = [record for record in _long(part["time"]) if record not in main]
    label = "heads of {head_dim}, {groups} to a key's"
    return _by_length(part["device"], others, label, "{ratio:.2f}") if others else ""


def _memory_table(part: Record) -> str:
    shown = _in_order(part["memory"], (SDPA, "stablemask", "definition"))
    return _by_length(part["device"], shown, "{name}", "{mib:,.1f}")


def _figure(part: Record) -> tuple[list[Panels], str]:
    """Time above, peak memory below."""
    time, memory = _main_shape(part["time"]), part["memory"]
    panels = [Panels("forward and backward", time), Panels("peak memory", memory, "mib")]
    return panels, f"{part['hardware']}; PyTorch {part['torch']}"
