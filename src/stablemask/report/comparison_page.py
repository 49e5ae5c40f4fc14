"""The page of a comparison."""

from collections.abc import Sequence
from typing import Any

from ..models.presets import NAMED_MASSES
from .comparison import Comparison, RunMeasurement
from .drawing import lines
from .figures import draw_all
from .page import listed, render
from .summary import (
    caveat,
    is_short,
    numbers_of_captions,
    sinks,
    table,
    takeaway,
    trained_tokens,
    what_differs,
)

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
    "global_batch_size", "learning_rate", "dtype", "seed",
)  # fmt: skip


def render_comparison(comparison: Comparison) -> str:
    """The whole page."""
    runs = list(comparison.runs.values())
    drawings = draw_all(comparison)
    return render(
        "comparison.html",
        title=f"Attention compared: {listed(list(comparison.runs))}",
        takeaway=takeaway(comparison),
        caveat=caveat(comparison),
        facts=_facts(comparison, runs),
        has_sink=bool(sinks(comparison)),
        is_short=is_short(comparison),
        comparison=comparison,
        legend=list(zip(comparison.runs, lines([run.attention for run in runs]))),
        rows=table(comparison),
        figures=[(name, title, drawings[name]) for name, title in FIGURES.items()],
        captions=numbers_of_captions(comparison),
        what_differs=what_differs(comparison),
        trainings="\n".join(run.record["command"] for run in runs),
        provenance=_provenance(comparison, runs),
        settings=_settings(runs),
    )


def _facts(comparison: Comparison, runs: Sequence[RunMeasurement]) -> str:
    positions = listed(list(dict.fromkeys(run.options["position"] for run in runs)))
    return (
        f"Here {len(runs)} models of {_range([run.parameters / 1e6 for run in runs], '.1f')} million "
        f"parameters ({runs[0].options['preset']}, positions: {positions}) were trained from scratch "
        f"on {_range([trained_tokens(run) for run in runs], ',')} tokens each, in blocks of "
        f"{comparison.context:,}. {what_differs(comparison)}"
    )


def _provenance(comparison: Comparison, runs: Sequence[RunMeasurement]) -> list[str]:
    record, machine = runs[0].record, comparison.machine
    training = record["train_tokens"]
    return [
        *dict.fromkeys(f"Trained with {_versions(run.record['versions'])}." for run in runs),
        f"Measured with {_versions(comparison.versions)}, on {machine['device']} "
        f"({machine['system']}, {machine['cpu']}, {machine['threads']} threads).",
        f"Text: {'streamed' if training is None else f'{training:,}'} training and "
        f"{record['validation_tokens']:,} validation tokens, key {record['corpus']}.",
    ]


def _settings(runs: Sequence[RunMeasurement]) -> dict[str, list[Any]]:
    return {
        **{name: [run.options[name] for run in runs] for name in SHOWN_OPTIONS},
        "gamma": [_gamma(run.gamma) for run in runs],
        "horizon": [
            "none"
            if run.gamma is None
            else run.options["context"]
            if run.attention in NAMED_MASSES
            else run.options["horizon"] or "infinite"
            for run in runs
        ],
        "parameters": [f"{run.parameters:,}" for run in runs],
    }


def _gamma(gamma: Any) -> str:
    if isinstance(gamma, float):
        return f"{gamma:.4g}"
    return "none" if gamma is None else str(gamma)


def _range(values: Sequence[float], form: str) -> str:
    """The value that all have, or the least and the largest."""
    least, largest = format(min(values), form), format(max(values), form)
    return least if least == largest else f"{least} to {largest}"


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
