"""The measurements as Markdown: ratios to the floor, one table a pass, dtype and shape."""

from collections.abc import Callable, Iterable
from typing import Any

Record = dict[str, Any]


def timing_tables(timings: list[Record]) -> str:
    """Ratios by length; a floor's own line has its milliseconds.

    A table has one column a length, of the sequence or of the cache.
    """
    tables: dict[str, list[Record]] = {}
    for record in timings:
        tables.setdefault(_title(record), []).append(record)
    return "\n\n".join(
        f"{title}\n\n{_pivot(records, _timing_text)}" for title, records in tables.items()
    )


def memory_table(records: list[Record]) -> str:
    """Peak MiB, and ratios to the row that has none."""
    tables: dict[str, list[Record]] = {}
    for record in records:
        tables.setdefault(f"**peak memory, {record['dtype']}**", []).append(record)
    return "\n\n".join(f"{title}\n\n{_pivot(part, _memory_text)}" for title, part in tables.items())


def training_table(records: list[Record]) -> str:
    """One table a workload. Speeds are shares, 1.10 is a tenth faster."""
    tables: dict[str, list[Record]] = {}
    for record in records:
        compiled = ", compiled" if record["compile"] else ""
        shape = f"{record['batch']} x {record['context']:,} tokens a step{compiled}"
        tables.setdefault(
            f"**training {record['preset']}, {record['dtype']}, {shape}**", []
        ).append(record)
    return "\n\n".join(f"{title}\n\n{_training_rows(part)}" for title, part in tables.items())


def _training_rows(records: list[Record]) -> str:
    columns: dict[str, Callable[[Any], str]] = {
        "tokens_per_second": "{:,.0f}".format, "of_softmax": "{:.3f}".format,
        "of_best_other": "{:.3f}".format, "mib": "{:,.0f}".format, "utilization": "{:.1%}".format,
    }  # fmt: skip
    titles = ("tokens/s", "of our softmax", "of the best other", "peak MiB", "utilization")
    shown = [
        (name, title)
        for name, title in zip(columns, titles)
        if any(r[name] is not None for r in records)
    ]
    lines = [["row", *(title for _, title in shown)], ["---"] * (len(shown) + 1)]
    lines += [
        [r["row"], *("" if r[name] is None else columns[name](r[name]) for name, _ in shown)]
        for r in records
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def generation_table(records: list[Record]) -> str:
    lines = [
        "| row | dtype | batch | prompt | tokens/s | of sdpa | prompt, ms | of sdpa |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['row']} | {r['dtype']} | {r['batch']} | {r['prompt']:,} "
        f"| {r['tokens_per_second']:,.1f} | {r['of_sdpa']:.3f} "
        f"| {r['prompt_ms']:,.1f} | {r['prompt_of_sdpa']:.3f} |"
        for r in records
    ]
    return "\n".join(lines)


def reasons(not_timed: Iterable[Record]) -> str:
    """Each row that was not timed and why, once for all cells that share the reason."""
    lines: dict[str, None] = {}  # a set that keeps its order
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
    return f"**{', '.join(parts)}**"


def _pivot(records: list[Record], text: Callable[[Record], str]) -> str:
    lengths = sorted({record["kv_len"] for record in records})
    rows: dict[tuple[str, str], dict[int, str]] = {}
    for record in records:
        label = (record["row"], record["computes"])
        rows.setdefault(label, {})[record["kv_len"]] = text(record)
    head = ["row", "computes", *(f"{length:,}" for length in lengths)]
    lines = [head, ["---"] * len(head)]
    lines += [[*label, *(cells.get(n, "") for n in lengths)] for label, cells in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _timing_text(record: Record) -> str:
    if record["ratio"] in (None, 1.0) and record["row"].startswith("sdpa"):
        return f"{record['ms']:.3g} ms"
    return f"{record['ratio']:.2f}" if record["ratio"] else f"{record['ms']:.3g} ms"


def _memory_text(record: Record) -> str:
    return f"{record['mib']:.1f} MiB ({record['ratio']:.2f})"
