"""The measurements as Markdown: ratios to the floor, one table a pass, dtype and shape."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
Columns = Sequence[tuple[str, str]]  # heads, and formats of a record's fields

_TRAINING: Columns = (
    ("row", "{row}"), ("tokens/s", "{tokens_per_second:,.0f}"),
    ("of our softmax", "{of_softmax:.3f}"), ("of the best other", "{of_best_other:.3f}"),
    ("peak MiB", "{mib:,.0f}"), ("utilization", "{utilization:.1%}"),
)  # fmt: skip
_GENERATION: Columns = (
    ("row", "{row}"), ("dtype", "{dtype}"), ("batch", "{batch}"), ("prompt", "{prompt:,}"),
    ("tokens/s", "{tokens_per_second:,.1f}"), ("of sdpa", "{of_sdpa:.3f}"),
    ("prompt, ms", "{prompt_ms:,.1f}"), ("of sdpa", "{prompt_of_sdpa:.3f}"),
)  # fmt: skip


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def records_table(records: Iterable[Record], columns: Columns) -> str:
    """A row for each record, a column for each format; one that no record has anything for is left out."""
    shown = [{k: _Nothing() if v is None else v for k, v in record.items()} for record in records]
    cells = [[text.format_map(record) for record in shown] for _, text in columns]
    kept = [column for column in zip((head for head, _ in columns), cells) if any(column[1])]
    return table([head for head, _ in kept], list(zip(*(cells for _, cells in kept))))


class _Nothing:
    def __format__(self, spec: str) -> str:
        return ""


def pivot(
    head: Sequence[str],
    records: Iterable[Record],
    label: Callable[[Record], Sequence[str]],
    across: str,
    text: Callable[[Record], str],
) -> str:
    """A row for each label, a column for each value of the field ``across``, numbers in ascending order."""
    rows: dict[tuple[str, ...], dict[Any, str]] = {}
    columns: dict[Any, None] = {}  # a set that keeps its order
    for record in records:
        columns[record[across]] = None
        rows.setdefault(tuple(label(record)), {})[record[across]] = text(record)
    order = sorted(columns, key=lambda value: value if isinstance(value, int) else 0)
    names = (f"{value:,}" if isinstance(value, int) else value for value in order)
    lines = [
        [*labels, *(cells.get(value, "") for value in order)] for labels, cells in rows.items()
    ]
    return table([*head, *names], lines)


def titled(
    records: Iterable[Record], title: Callable[[Record], str], body: Callable[[list[Record]], str]
) -> str:
    """A table of the records of each title, under it in bold."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(title(record), []).append(record)
    return "\n\n".join(f"**{name}**\n\n{body(part)}" for name, part in found.items())


def timing_tables(timings: Iterable[Record]) -> str:
    """Ratios by length, of the sequence or of the cache; a floor's own line has its milliseconds."""
    return titled(timings, _title, lambda records: _by_length(records, _timing_text))


def memory_table(records: Iterable[Record]) -> str:
    """Peak MiB, and ratios to the row that has none."""

    def text(record: Record) -> str:
        return f"{record['mib']:.1f} MiB ({record['ratio']:.2f})"

    title = "peak memory, {dtype}".format_map
    return titled(records, title, lambda part: _by_length(part, text))


def training_table(records: Iterable[Record]) -> str:
    """One table a workload. Speeds are shares, 1.10 is a tenth faster."""

    def title(record: Record) -> str:
        compiled = ", compiled" if record["compile"] else ""
        text = "training {preset}, {dtype}, {batch} x {context:,} tokens a step"
        return text.format_map(record) + compiled

    return titled(records, title, lambda part: records_table(part, _TRAINING))


def generation_table(records: Iterable[Record]) -> str:
    return records_table(records, _GENERATION)


def reasons(not_timed: Iterable[Record]) -> str:
    """Each row that was not timed and why, once for all cells that share the reason."""
    lines: dict[str, None] = {}
    for record in not_timed:
        verdict = "INCORRECT: " if record["incorrect"] else ""
        lines[f"- {record['row']}, {record['pass']}: {verdict}{record['reason']}"] = None
    return "\n".join(lines)


def _title(record: Record) -> str:
    parts = [record["pass"], record["dtype"], f"head_dim {record['head_dim']}"]
    if record["groups"] > 1:
        parts.append(f"{record['groups']} query heads a key head")
    if record["q_len"] < record["kv_len"]:
        parts.append(f"batch {record['batch']}")
    if record["mask"] != "causal":
        parts.append(record["mask"])
    return ", ".join(parts)


def _by_length(records: Iterable[Record], text: Callable[[Record], str]) -> str:
    names = ("row", "computes")
    return pivot(names, records, lambda record: [record[name] for name in names], "kv_len", text)


def _timing_text(record: Record) -> str:
    if record["ratio"] in (None, 1.0) and record["row"].startswith("sdpa"):
        return f"{record['ms']:.3g} ms"
    return f"{record['ratio']:.2f}" if record["ratio"] else f"{record['ms']:.3g} ms"
