"""Where a model's attention goes on a text, as one HTML page: sinks, mask ratio, attention maps."""

from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from stablemask.cli.models import load
from stablemask.cli.options import InspectOptions
from stablemask.cli.page import labels, where_it_is
from stablemask.data import load_tokenizer
from stablemask.errors import InputError
from stablemask.report.inspection import MAP_BYTES, Inspection, inspect_model
from stablemask.report.inspection_page import render_inspection, summary_rows, takeaway
from stablemask.writing import whole_file


def run(options: InspectOptions) -> None:
    names = [options.model] if options.against is None else [options.model, options.against]
    if len(set(names)) < len(names):
        raise InputError(f"--against must be another model, got {options.against} twice")
    with whole_file(options.out) as partial:
        inspections: list[Inspection] = []
        for name, label in zip(names, labels(names), strict=True):
            tokenizer = load_tokenizer(name)
            is_first = name == options.model
            prefix = _token_id(tokenizer, options.prefix) if is_first else None
            inspections.append(
                inspect_model(
                    load(replace(options, model=name)),
                    tokenizer,
                    options.text,
                    label=label,
                    max_tokens=options.max_tokens,
                    prefix=prefix,
                    special_tokens=options.prefix is None,  # or the other model may get one too
                    map_bytes=MAP_BYTES // len(names),
                )
            )
        partial.write_text(render_inspection(inspections), encoding="utf-8")
    print(f"{_table(inspections)}\n\n{takeaway(inspections)}")
    print(f"\n{where_it_is(options.out)}")


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str | None) -> int | None:
    if token is None or token.isdecimal():
        return None if token is None else int(token)
    ids: list[int] = tokenizer.encode(token, add_special_tokens=False)
    if len(ids) != 1:
        raise InputError(f"--prefix must be one token, or its id; {token!r} is {len(ids)} tokens")
    return ids[0]


def _table(inspections: list[Inspection]) -> str:
    rows = [("", [one.label for one in inspections]), *summary_rows(inspections)]
    columns = list(zip(*([name, *values] for name, values in rows)))
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip([name, *values], widths)).rstrip()
        for name, values in rows
    )
