"""The page of a comparison."""

from collections.abc import Sequence
from html import escape
from typing import Any

from .comparison import Comparison, RunMeasurement
from .figures import draw_all
from .page import PAPER, page, paragraphs, swatch
from .summary import captions, is_short, table, trained_tokens, what_differs

FIGURES = {
    "loss": "Loss during training",
    "perplexity": "Perplexity at and beyond the training length",
    "map": "Where attention goes: one head, token by token",
    "heads": "The same layer, all heads",
    "ratio": "Mask ratio by position",
    "layers": "Attention by layer",
    "identical": "The same token at every position",
}
# Options of a run that a reader wants to see, beside what is measured.
SHOWN_OPTIONS = (
    "preset", "attention", "position", "data", "context", "vocab_size", "steps",
    "batch_size", "gradient_accumulation", "learning_rate", "dtype", "seed",
)  # fmt: skip


def render(comparison: Comparison) -> str:
    """The whole page."""
    parts = (_lead, _table, _figures, _samples, _reproduce)
    return page(_title(comparison), [part(comparison) for part in parts])


def _title(comparison: Comparison) -> str:
    *others, last = comparison.runs
    return f"Attention compared: {', '.join(others)} and {last}"


def _lead(comparison: Comparison) -> str:
    runs = list(comparison.runs.values())
    options = runs[0].options
    positions = " and ".join(dict.fromkeys(run.options["position"] for run in runs))
    parameters = _range([run.parameters / 1e6 for run in runs], ".1f")
    tokens = _range([trained_tokens(run) for run in runs], ",")
    facts = (
        f"Here {len(runs)} models of {parameters} million parameters ({options['preset']}, positions: "
        f"{positions}) are trained from scratch on {tokens} tokens each, in blocks of "
        f"{options['context']:,}. {what_differs(comparison)}"
    )
    return f"""<p class="lead">In a causal language model every token must hand out exactly 1 of
attention, even when nothing before it is of use; models learn to dump the surplus on the first
token, and with relative positions alone (such as RoPE) they cannot know where a token stands.
<a href="{PAPER}">StableMask</a> gives every row a <em>pseudo mass</em> in place of the masked
future: it takes part in the softmax and carries no value, so surplus attention has somewhere to go.
It shrinks from row to row, and so tells the model its position. It has no parameters and runs on the
stock attention kernels.</p>
<p>{escape(facts)}</p>"""


def _table(comparison: Comparison) -> str:
    heads = "".join(
        f'<th scope="col">{swatch(run.attention)}{escape(label)}</th>'
        for label, run in comparison.runs.items()
    )
    body = []
    for row in table(comparison):
        cells = "".join(
            f"<td{_class('best', row.best == label)}>{escape(row.text(label))}</td>"
            for label in comparison.runs
        )
        body.append(f'<tr><th scope="row">{escape(row.name)}</th>{cells}</tr>')
    notes = [
        f"{label}, {row['length']:,} tokens: {row['note']}"
        for label, run in comparison.runs.items()
        for row in run.perplexity
        if row["note"]
    ]
    return f"""<h2>The numbers</h2>
<div class="scroll"><table class="numbers"><thead><tr><th></th>{heads}</tr></thead>
<tbody>{"".join(body)}</tbody></table></div>
<p class="soft">Perplexity is the exponential of the mean loss; lower is better, and the lowest is
bold. Tokens per second is the median over the log lines of each training; what else its machine did
weighs on it, and <code>stablemask bench</code> is the fair race. Attention is averaged over layers, heads and rows. The last row feeds one token over and
over: 0 up to rounding means that the model cannot tell positions apart.</p>
{paragraphs(notes, "notes")}"""


def _figures(comparison: Comparison) -> str:
    images, texts = draw_all(comparison), captions(comparison)
    parts = [
        f"""<section><h3>Figure {number}. {escape(title)}</h3>
<figure><div class="scroll"><img alt="{escape(title)}" src="{images[name]}"></div>
<figcaption>{escape(texts[name])}</figcaption></figure></section>"""
        for number, (name, title) in enumerate(FIGURES.items(), 1)
    ]
    return "<h2>The figures</h2>\n" + "\n".join(parts)


def _samples(comparison: Comparison) -> str:
    how = (
        "greedily"
        if comparison.temperature == 0
        else f"at temperature {comparison.temperature:g}, seed {comparison.seed}"
    )
    samples = "\n".join(
        f"<div><h3>{swatch(run.attention)}{escape(label)}</h3>"
        f'<pre class="wrap"><b>{escape(comparison.prompt)}</b>{escape(run.sample)}</pre></div>'
        for label, run in comparison.runs.items()
    )
    hint = ""
    if is_short(comparison):
        hint = " After so short a training, look for the shape of the text rather than its sense."
    return f"""<h2>A sample of each</h2>
<p class="soft">The same prompt (in bold) continued {how}.{hint}</p>
<div class="samples">
{samples}
</div>"""


def _reproduce(comparison: Comparison) -> str:
    trainings = [run.record["command"] for run in comparison.runs.values()]
    commands = ""
    if comparison.command is not None:
        commands = f"<p>This page:</p><pre>{escape(comparison.command)}</pre><p>Each training:</p>"
    first = comparison.runs[comparison.baseline]
    machine = comparison.machine
    lines = [
        *dict.fromkeys(
            f"Trained with {_versions(run.record['versions'])}." for run in comparison.runs.values()
        ),
        f"Measured with {_versions(comparison.versions)}, on {machine['device']} "
        f"({machine['system']}, {machine['cpu']}, {machine['threads']} threads).",
        f"Text: {_count(first.record['train_tokens'])} training and "
        f"{first.record['validation_tokens']:,} validation tokens, key {first.record['corpus']}.",
    ]
    return f"""<h2>Do it again</h2>
{commands}<pre>{escape(chr(10).join(trainings))}</pre>
{paragraphs(lines, "soft")}
<div class="scroll">{_settings(comparison)}</div>"""


def _settings(comparison: Comparison) -> str:
    heads = "".join(f'<th scope="col">{escape(label)}</th>' for label in comparison.runs)
    runs = comparison.runs.values()
    rows: list[tuple[str, list[Any]]] = [
        (name, [run.options[name] for run in runs]) for name in SHOWN_OPTIONS
    ]
    rows.append(("gamma", [_gamma(run) for run in runs]))
    rows.append(("horizon", [_horizon(run) for run in runs]))
    rows.append(("parameters", [f"{run.parameters:,}" for run in runs]))
    body = "".join(
        f'<tr{_class("differs", name in comparison.differences)}><th scope="row">'
        f"{escape(name.replace('_', ' '))}</th>{_cells(values)}</tr>"
        for name, values in rows
    )
    return f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{body}</tbody></table>"


def _range(values: Sequence[float], form: str) -> str:
    """The value that all have, or the least and the largest."""
    least, largest = format(min(values), form), format(max(values), form)
    return least if least == largest else f"{least} to {largest}"


def _gamma(run: RunMeasurement) -> str:
    if isinstance(run.gamma, float):
        return f"{run.gamma:.4g}"
    return "none" if run.gamma is None else str(run.gamma)


def _horizon(run: RunMeasurement) -> str:
    if run.gamma is None:
        return "none"
    return str(run.options["horizon"] or "infinite")


def _cells(values: Sequence[Any]) -> str:
    return "".join(f"<td>{escape(str(value))}</td>" for value in values)


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _count(tokens: int | None) -> str:
    return "streamed" if tokens is None else f"{tokens:,}"


def _class(name: str, applies: bool) -> str:
    return f' class="{name}"' if applies else ""
