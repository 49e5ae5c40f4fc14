"""A comparison in words and in a table. What a sentence claims, it computes."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..evaluation.perplexity import perplexity_text
from ..evaluation.sinks import even_first_token
from .comparison import Comparison, RunMeasurement
from .page import SINK, listed

MANIFOLD = 10  # from this ratio on it is told as such, not in percent
ATTENTION_OPTIONS = {"attention", "gamma", "horizon", "hold", "shift", "floor", "layers"}


@dataclass(frozen=True)
class Row:
    """One measure of every run, its unit and what it means; ``better`` is min or max where one end is."""

    name: str
    meaning: str
    values: dict[str, float | None]
    show: Callable[[float], str]
    better: Callable | None = None

    def text(self, label: str) -> str:
        value = self.values[label]
        return "–" if value is None else self.show(value)

    @property
    def best(self) -> str | None:
        """The label of the best run, None where no end is better or two runs look the same."""
        known = {label: value for label, value in self.values.items() if value is not None}
        if self.better is None or len(known) < 2:
            return None
        best = self.better(known, key=known.__getitem__)
        ties = [label for label in known if self.text(label) == self.text(best)]
        return best if ties == [best] else None


def table(comparison: Comparison) -> list[Row]:
    even = even_first_token(comparison.context)
    share = "{:.1%}".format
    measures: list[tuple[str, str, Callable, Callable, Callable | None]] = [
        ("training loss, the last logged",
         "nats per token, the mean since the log line before; lower is better",
         lambda run: run.training[-1]["loss"] if run.training else None, "{:.4f}".format, min),
        ("validation loss at the end", "nats per token, on text it was not trained on; lower is better",
         lambda run: run.record["result"]["eval_loss"], "{:.4f}".format, min),
        ("training, tokens per second", "median over the log lines; what else the machine did weighs on it, and "
         "stablemask bench is the fair race", lambda run: run.tokens_per_second, "{:,.0f}".format, None),
        ("attention on the first token",
         f"share of each later row, mean over layers, heads and rows; an even spread gives {even:.1%}",
         lambda run: fmean(run.first_token), share, None),
        ("... of what real tokens receive", "the same as a share of what the pseudo mass leaves",
         lambda run: fmean(run.first_token_of_real), share, None),
        ("attention that real tokens receive", "share of a row; the rest, the mask ratio, goes to the pseudo mass, "
         "which carries no value", lambda run: fmean(run.real_share), share, None),
        ("spread of identical tokens' output", "how far one token, repeated, moves the model's last features, which "
         "are of unit scale; 0 up to rounding: it cannot tell positions apart",
         lambda run: run.identical_spread, "{:.2g}".format, None),
    ]  # fmt: skip
    lengths = [
        (
            f"validation perplexity, {row['length']:,} tokens ({row['multiple']}x)",
            "among how many tokens the model is torn, on average; lower is better"
            if row["multiple"] == 1
            else f"the same on texts {row['multiple']} times as long as those of the training",
            lambda run, index=index: run.perplexity[index]["perplexity"],
            perplexity_text,
            min,
        )
        for index, row in enumerate(_base(comparison).perplexity)
    ]
    return [
        Row(name, meaning, {lab: value(run) for lab, run in comparison.runs.items()}, show, better)
        for name, meaning, value, show, better in [*lengths, *measures]
    ]


def text_table(comparison: Comparison) -> str:
    """The table for a terminal."""
    rows = table(comparison)
    labels = list(comparison.runs)
    wide = max(len(row.name) for row in rows)
    columns = {label: max(len(label), *(len(row.text(label)) for row in rows)) for label in labels}
    lines = ["  ".join([" " * wide, *(label.rjust(columns[label]) for label in labels)])]
    for row in rows:
        cells = [row.text(label).rjust(columns[label]) for label in labels]
        lines.append("  ".join([row.name.ljust(wide), *cells]))
    return "\n".join(lines)


def takeaway(comparison: Comparison) -> str:
    """What was found, in one sentence."""
    base = _base(comparison).perplexity[0]
    found = [
        f"{perplexity_text(row['perplexity'])} with {label}, {change(row['perplexity'], base['perplexity'])}"
        for label, run in _others(comparison)
        if _is_finite(row := run.perplexity[0]) and _is_finite(base)
    ]
    where = f"At the training length of {comparison.context:,} tokens the validation perplexity"
    told = f"{where} was not scored by all runs"
    if found:
        first = f"{perplexity_text(base['perplexity'])} with {comparison.baseline}"
        told = f"{where} is {listed([first, *found])}"
    shares = {label: f"{fmean(run.first_token):.1%}" for label, run in comparison.runs.items()}
    if with_sink := sinks(comparison):
        without = [f"{label} ({shares[label]})" for label in shares if label not in with_sink]
        having = [f"{label} ({shares[label]} of all attention)" for label in with_sink]
        told += f"; the first token is a sink in {listed(having)}"
        told += f" and not in {listed(without)}" if without else ""
    return told + "."


def caveat(comparison: Comparison) -> str:
    """What that does not show, in one sentence."""
    chance = "one seed of each cannot tell a gap from chance"
    if not is_short(comparison):
        return f"This is one training of each: {chance}, and another size or text may turn it."
    seen = min(trained_tokens(run) / run.parameters for run in comparison.runs.values())
    trend = ""
    gaps = _gaps(_others(comparison)[0][1], _base(comparison))
    if len(comparison.runs) == 2 and gaps:
        (step, widest), (_, last) = max(gaps, key=lambda gap: abs(gap[1])), gaps[-1]
        trend = (
            f"the gap is largest at the end, {abs(last):.3f} nats a token, and may shrink; "
            if widest == last
            else f"the gap was largest at step {step:.0f}, {abs(widest):.3f} nats a token, and is "
            f"{abs(last):.3f} at the end; "
        )
    return (
        f"This is one short training of each ({seen:.2g} tokens a parameter, where 20 are usual): "
        f"{trend}{chance}."
    )


def sinks(comparison: Comparison) -> list[str]:
    """The runs that have a layer whose first token is a sink, of what real tokens receive."""
    least = SINK * even_first_token(comparison.context)
    return [label for label, run in comparison.runs.items() if max(run.first_token_of_real) > least]


def _gaps(run: RunMeasurement, base: RunMeasurement) -> list[tuple[float, float]]:
    """By step, how much the validation loss is above the baseline's."""
    known = {point["step"]: point["loss"] for point in base.validation}
    return [
        (point["step"], point["loss"] - known[point["step"]])
        for point in run.validation
        if point["step"] in known
    ]


def numbers_of_captions(comparison: Comparison) -> dict[str, Any]:
    """What the captions of the figures, in ``templates/captions.html``, name beside the comparison itself."""
    base, runs = _base(comparison), comparison.runs
    return {
        "even": even_first_token(comparison.context),
        "even_on_the_snippet": even_first_token(len(comparison.snippet)),
        "gaps": {label: _gaps(run, base) for label, run in _others(comparison)},
        "changes": {
            label: [
                f"{change(ours['perplexity'], theirs['perplexity'])} at {ours['length']:,} tokens"
                for ours, theirs in zip(run.perplexity, base.perplexity)
                if _is_finite(ours) and _is_finite(theirs)
            ]
            for label, run in _others(comparison)
        },
        "not_scored": [
            f"{row['length']:,}"
            for index, row in enumerate(base.perplexity)
            if any(run.perplexity[index]["perplexity"] is None for run in runs.values())
        ],
        "on_the_map": listed(
            [
                f"in {label}, {_to_first(run, comparison.head):.1%} and "
                f"{fmean(run.map_pseudo[comparison.head][1:]):.1%}"
                for label, run in runs.items()
            ]
        ),
        "of_heads": listed(
            [
                f"from {min(shares):.1%} to {max(shares):.1%} in {label}"
                for label, run in runs.items()
                if (shares := [_to_first(run, head) for head in range(len(run.map_real))])
            ]
        ),
        "ratios": {label: _first_and_last(run) for label, run in runs.items()},
        "with_sink": sinks(comparison),
    }


def _to_first(run: RunMeasurement, head: int) -> float:
    """What the later rows of the snippet give the first token."""
    return fmean(row[0] for row in run.map_real[head][1:])


def _first_and_last(run: RunMeasurement) -> tuple[float, float] | None:
    """The mask ratio at the first position and at the last, over layers and heads; None where it is 0 everywhere."""
    heads = [head for layer in run.mask_ratio for head in layer]
    if not any(map(any, heads)):
        return None
    return fmean(head[0] for head in heads), fmean(head[-1] for head in heads)


def what_differs(comparison: Comparison) -> str:
    """How far the runs are the same, in a sentence."""
    differences = comparison.differences
    if not differences:
        return "The runs have the same options."
    names = listed([name.replace("_", " ") for name in differences])
    if set(differences) <= ATTENTION_OPTIONS:
        return (
            f"The runs differ in {names} and in nothing else: "
            "same text, same order of batches, same seed, same schedule."
        )
    return f"Mind that the runs differ in {names}."


def change(value: float, base: float) -> str:
    """``value`` against ``base`` in words."""
    if value / base >= MANIFOLD:
        return f"{value / base:.3g} times as high"
    ratio = value / base - 1
    if abs(ratio) < 0.0005:
        return "the same within 0.1%"
    return f"{abs(ratio):.1%} {'lower' if ratio < 0 else 'higher'}"


def _is_finite(row: dict[str, Any]) -> bool:
    return row["perplexity"] is not None and math.isfinite(row["perplexity"])


def trained_tokens(run: RunMeasurement) -> int:
    options = run.options
    return int(options["steps"] * options["global_batch_size"] * options["context"])


def is_short(comparison: Comparison) -> bool:
    """Whether a run has seen less than twenty tokens a parameter, the usual measure of a whole training."""
    return any(trained_tokens(run) < 20 * run.parameters for run in comparison.runs.values())


def _base(comparison: Comparison) -> RunMeasurement:
    return comparison.runs[comparison.baseline]


def _others(comparison: Comparison) -> list[tuple[str, RunMeasurement]]:
    return list(comparison.runs.items())[1:]
