"""Writes the GPU section of docs/benchmarks.md from what ``gpu.py`` has measured."""

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from stablemask.writing import write_whole

from .gpu import LIMITS, RESULTS, ROOT, read
from .tables import pivot, table, titled, training_table

PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN = "<!-- written by `python -m benchmarks gpu page` -->"
END = "<!-- end of what is written -->"
MOST_REASONS = 12  # of failures on the page; the file has all
Record = Mapping[str, Any]

NOT_MEASURED = """**Not measured yet.** Nobody has run this on a GPU; the CUDA paths are tested on CPUs, against the contract of
PyTorch's CUDA operators.

`make gpu` measures a machine with an NVIDIA GPU in 500 seconds: first whether the kernels and everything on them are
right, then speed, memory and training. `python -m benchmarks gpu --resume` goes on with what did not fit in, and
`python -m benchmarks gpu page` writes this section from the results."""


def section(rows: Sequence[Record]) -> str:
    """Markdown of a file of results; of none, how to get one."""
    if not rows:
        return NOT_MEASURED
    parts = {part: [row for row in rows if row["part"] == part] for part in ("parts", *LIMITS)}
    masked = [*parts["masks"], *parts["flex"]]
    blocks = [
        _machine(parts["contract"]),
        _checked(parts["contract"], [*parts["tests"], *parts["flex"]]),
        _speed("Forward", parts["attention"], "forward"),
        _speed("Forward and backward", parts["attention"], "forward+backward"),
        _times("Decoding one token: microseconds", parts["decode"], "decode", 1e3),
        _times("Under a mask, forward and backward: ms", masked, "forward+backward", 1),
        _memory(parts["masks"]),
        *(_training(parts[name]) for name in LIMITS if name.startswith("train")),
        _pair(parts["pair-160m"]),
        _not_done(parts),
    ]
    return "\n\n".join(block for block in blocks if block)


def write(rows: Sequence[Record], page: Path) -> None:
    """Put the section between its marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"{page} has no section between {BEGIN!r} and {END!r}")
    write_whole(page, f"{before}{BEGIN}\n{section(rows)}\n{END}{after}")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu page", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help=f"of results (default: {RESULTS})")
    options = parser.parse_args(arguments)
    if options.file is not None and not options.file.is_file():
        parser.error(f"there is no file {options.file}")
    write(read(options.file or RESULTS), PAGE)
    print(f"wrote {PAGE}")


def _machine(rows: list[Record]) -> str:
    found = [row for row in rows if row["case"] == "machine"]
    if not found:
        return ""
    machine = found[-1]
    versions = machine["versions"]
    named = [f"{name} {versions[name]}" for name in ("torch", "cuda", "cudnn") if name in versions]
    capability = ".".join(map(str, machine["capability"]))
    return (
        f"{machine['hardware']} (compute capability {capability}), {', '.join(named)}, "
        f"{machine['date']}, by `{machine['command']}`. bfloat16; ratios are to the fastest stock "
        "SDPA in the same rounds."
    )


def _checked(contract: list[Record], tests: list[Record]) -> str:
    checks = [row for row in contract if "ok" in row]
    lines = []
    if checks:
        right = sum(row["ok"] for row in checks)
        lines.append(f"{right} of {len(checks)} checks of the kernels against float64 hold.")
    counts: Counter[str] = Counter()
    whole = {row["case"] for row in tests if "counts" in row}
    latest = {row["case"]: row["counts"] for row in tests if "counts" in row}
    for case, count in latest.items():
        if case.removesuffix(", so far") == case or case.removesuffix(", so far") not in whole:
            counts.update(count)
    if counts:
        named = ("passed", "failed", "skipped")
        lines.append(f"Tests on it: {', '.join(f'{counts[name]} {name}' for name in named)}.")
    wrong = [(row["case"], row.get("reason", "")) for row in checks if not row["ok"]]
    wrong += [(row["case"], row["failed"]) for row in tests if "failed" in row]
    listed = [f"- {case}: {_cell(reason)}" for case, reason in wrong[:MOST_REASONS]]
    if len(wrong) > MOST_REASONS:
        listed.append(f"- and {len(wrong) - MOST_REASONS} more")
    return "\n\n".join(filter(None, [" ".join(lines), "\n".join(listed)]))


def _speed(title: str, rows: list[Record], kind: str) -> str:
    def text(row: Record) -> str:
        share = f" ({row['of_peak']:.0%})" if "of_peak" in row else ""
        return f"{row['ratio']:.2f}, {row['tflops']:.0f}{share}"

    title = f"{title}: ratio, TFLOP/s (share of the card's peak)"
    return _pivot(title, _timed(rows, kind), "case", text)


def _times(title: str, rows: list[Record], kind: str, scale: float) -> str:
    def text(row: Record) -> str:
        return f"{_three(row['ms'] * scale)} ({row['ratio']:.2f})"

    return _pivot(f"{title} (ratio)", _timed(rows, kind), "row", text)


def _timed(rows: list[Record], kind: str) -> list[Record]:
    return [row for row in rows if row.get("pass") == kind and row.get("ratio")]


def _memory(rows: list[Record]) -> str:
    told = [{**row, "case": row["mask"]} for row in rows if "mib" in row]
    tokens = told[0]["kv_len"] if told else 0
    title = f"Peak memory above the inputs, forward and backward of {tokens:,} tokens: MiB"
    return _pivot(title, told, "row", lambda row: f"{row['mib']:,.0f}")


def _training(rows: list[Record]) -> str:
    return training_table(row for row in rows if "tokens_per_second" in row)


def _pair(rows: list[Record]) -> str:
    title = "{preset}, {steps} steps of {batch} blocks of Python's sources, one seed: validation perplexity"

    def body(done: list[Record]) -> str:
        cells = [[row["case"], f"{row['perplexity']:.2f}"] for row in done]
        return table(["attention", "perplexity"], cells)

    return titled([row for row in rows if "perplexity" in row], title.format_map, body)


def _not_done(parts: dict[str, list[Record]]) -> str:
    ended = {row["case"]: row["exit"] for row in parts["parts"]}
    missing = [
        f"{name} ({ended.get(name, 'not begun')})" for name in LIMITS if ended.get(name) != 0
    ]
    refused = dict.fromkeys(
        f"- {row['row']}: {_cell(row['reason'])}"
        for name in LIMITS
        for row in parts[name]
        if "row" in row and "reason" in row
    )
    lines = ["Not timed:\n\n" + "\n".join(list(refused)[:MOST_REASONS])] if refused else []
    lines += [f"Parts that did not end: {', '.join(missing)}."] if missing else []
    return "\n\n".join(lines)


def _pivot(title: str, rows: Sequence[Record], across: str, text: Callable[[Record], str]) -> str:
    """A line a case and a column a row of the benchmark, or the other way round; nothing of no rows."""
    down = "row" if across == "case" else "case"
    found = pivot([""], rows, lambda row: [row[down]], across, text)
    return f"**{title}**\n\n{found}" if rows else ""


def _three(value: float) -> str:
    """With three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
