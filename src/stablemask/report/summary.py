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

# Outputs of unit scale that differ by less than this differ by the rounding of float32.
ROUNDING = 1e-4
MANIFOLD = 10  # from this ratio on it is told as such, not in percent
ATTENTION_OPTIONS = {"attention", "gamma", "horizon", "hold", "floor", "layers"}


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
    trend = "Figure 1 shows how the gaps went; "
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


def captions(comparison: Comparison) -> dict[str, str]:
    """What each figure of ``figures.draw_all`` shows, by its name."""
    write = {
        "loss": _loss,
        "perplexity": _perplexity,
        "map": _map,
        "heads": _heads,
        "ratio": _ratio,
        "layers": _layers,
        "identical": _identical,
    }
    return {name: " ".join(sentences(comparison)) for name, sentences in write.items()}


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


def _loss(comparison: Comparison) -> list[str]:
    sentences = [
        what_differs(comparison),
        "A point of the training loss (pale) is the mean since the one before.",
    ]
    for label, run in _others(comparison):
        gaps = _gaps(run, _base(comparison))
        if not gaps:
            continue
        below = sum(gap < 0 for _, gap in gaps)
        step, last = gaps[-1]
        sentences.append(
            f"The validation loss of {label} is below that of {comparison.baseline} at {below} of "
            f"{len(gaps)} evaluations; at the last, step {step:.0f}, it is {abs(last):.3f} nats a "
            f"token {'lower' if last < 0 else 'higher'}."
        )
    return sentences


def _perplexity(comparison: Comparison) -> list[str]:
    base = _base(comparison)
    sentences = []
    for label, run in _others(comparison):
        parts = [
            f"{change(ours['perplexity'], theirs['perplexity'])} at {ours['length']:,} tokens"
            for ours, theirs in zip(run.perplexity, base.perplexity)
            if _is_finite(ours) and _is_finite(theirs)
        ]
        if parts:
            sentences.append(
                f"Against {comparison.baseline}, the perplexity of {label} is {listed(parts)}."
            )
    known = {
        label: {row["length"]: row["perplexity"] for row in run.perplexity if _is_finite(row)}
        for label, run in comparison.runs.items()
    }
    longest = max(
        length for by_length in [*known.values(), {comparison.context: 0}] for length in by_length
    )
    growth = []
    for label, by_length in known.items():
        if longest > comparison.context and {comparison.context, longest} <= by_length.keys():
            ratio = by_length[longest] / by_length[comparison.context]
            by = f"{ratio - 1:+.1%}" if ratio < MANIFOLD else f"a factor of {ratio:.3g}"
            growth.append(f"{label}'s by {by}")
    if growth:
        sentences.append(
            f"From {comparison.context:,} to {longest:,} tokens it changes: {listed(growth)}."
        )
    everything = base.record["validation_tokens"]
    which = "all" if comparison.validation_tokens == everything else "the first"
    missing = sorted({row["length"] for run in comparison.runs.values() for row in run.perplexity
                      if row["perplexity"] is None})  # fmt: skip
    if missing:
        lengths = listed([f"{length:,}" for length in missing])
        sentences.append(f"Not scored by every run: {lengths} tokens (the reasons are below).")
    sentences.append(
        f"Scored on {which} {comparison.validation_tokens:,} validation tokens in windows that do not "
        "overlap, as in the project's tables: the first tokens of each window have little to go "
        "by. The command stablemask evaluate overlaps its windows unless told otherwise (--stride), so its "
        "values are others."
    )
    return sentences


def _map(comparison: Comparison) -> list[str]:
    head, even = comparison.head, even_first_token(len(comparison.snippet))
    shares = []
    for label, run in comparison.runs.items():
        first = fmean(row[0] for row in run.map_real[head][1:])
        pseudo = fmean(run.map_pseudo[head][1:])
        shares.append(f"in {label}, {first:.1%} and {pseudo:.1%}")
    return [
        f"Layer {comparison.layer}, head {head} on the beginning of the validation text: of all "
        "heads, the one that gives the first token most, over all runs.",
        "A row shares exactly 1 among its own token, the tokens before it and, in the narrow last "
        "column, the pseudo mass, which carries no value; gray is the future, which no row sees.",
        f"Rows after the first give the first token and the pseudo mass, on average: "
        f"{listed(shares)}; spread evenly, the first token would have {even:.1%}.",
        "The models were trained apart, so a head need not do the same in all of them.",
    ]


def _heads(comparison: Comparison) -> list[str]:
    parts = []
    for label, run in comparison.runs.items():
        by_head = [fmean(row[0] for row in head[1:]) for head in run.map_real]
        parts.append(f"from {min(by_head):.1%} to {max(by_head):.1%} in {label}")
    return [
        f"All heads of layer {comparison.layer} on the same text and the same colour scale.",
        f"What they give the first token goes {listed(parts)}.",
    ]


def _ratio(comparison: Comparison) -> list[str]:
    last = comparison.context - 1
    sentences = []
    for label, run in comparison.runs.items():
        heads = [head for layer in run.mask_ratio for head in layer]
        if not any(map(any, heads)):
            sentences.append(f"{label} has no pseudo mass: its ratio is 0 everywhere.")
            continue
        start, end = fmean(head[0] for head in heads), fmean(head[-1] for head in heads)
        low, high = min(head[-1] for head in heads), max(head[-1] for head in heads)
        sentences.append(
            f"Over all layers and heads of {label}, the mask ratio goes from {start:.1%} at "
            f"position 0 to {end:.1%} at position {last:,}, where heads range from {low:.1%} to "
            f"{high:.1%}."
        )
        if isinstance(run.gamma, float):
            sentences.append(
                f"With one gamma ({run.gamma:.4g}) the pseudo mass M of a position is the same in "
                "every head; the ratio M / (Z + M) is not, for the real mass Z is the head's own."
            )
        elif run.gamma is not None:
            sentences.append(
                f"In {label} every head has a gamma, and so a pseudo mass, of its own."
            )
    smoothing = comparison.context // 32
    if smoothing > 1:
        sentences.append(
            f"One line a head, from pale (head 0) to dark; running means over {smoothing} positions."
        )
    sentences.append(_averaged(comparison))
    return sentences


def _layers(comparison: Comparison) -> list[str]:
    def means(values: Callable[[RunMeasurement], list[float]]) -> str:
        runs = comparison.runs.items()
        return listed([f"{fmean(values(run)):.1%} in {label}" for label, run in runs])

    even, with_sink = even_first_token(comparison.context), sinks(comparison)
    return [
        f"The first token gets {means(lambda run: run.first_token)} (mean over layers).",
        "Whatever the pseudo mass takes lowers every other share too; of what is left to real "
        f"tokens, the first gets {means(lambda run: run.first_token_of_real)}.",
        f"Real tokens receive {means(lambda run: run.real_share)}.",
        f"Spread evenly, attention would leave the first token {even:.1%} (dotted); row 0, which "
        "sees nothing else, is left out of these two.",
        (
            f"A layer that gives it more than twice as much is found in {listed(with_sink)}."
            if with_sink
            else "No layer of any run gives it more than twice as much, so none has made it a sink."
        ),
        _averaged(comparison),
    ]


def _identical(comparison: Comparison) -> list[str]:
    sentences = [
        f"One token, {comparison.identical_token!r}, repeated {comparison.context:,} times: does the "
        "final hidden state depend on where it stands?"
    ]
    for label, run in comparison.runs.items():
        spread = run.identical_spread
        verdict = (
            "rounding, so the output says nothing of the position"
            if spread < ROUNDING
            else "far more than rounding, so the output depends on the position"
        )
        sentences.append(f"In {label} it moves by at most {spread:.2g}: {verdict}.")
    return sentences


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


def _averaged(comparison: Comparison) -> str:
    return (
        f"Mean over {comparison.attention_blocks} blocks of {comparison.context:,} tokens, spread "
        "over the validation text."
    )
