"""The first table of the page: each figure of the paper's, and what stands beside it here.

The figures are the authors' (arXiv 2402.04779), read in a text of the paper that lost most formulas and the
perplexities of its Table 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.tables import table
from stablemask.evaluation.perplexity import perplexity_of
from stablemask.evaluation.statistics import Estimate, estimate

from . import ablation, language, long_training
from .kinds import LABELS
from .language_section import SAME, by_seed, difference
from .position import ENCODINGS
from .position import REFERENCES as ABSOLUTE
from .position_results import Results, at_chance, solved
from .study import Record, Section, Verdict
from .sweep import finals, sizes_of

GPU = "needs a GPU, and data from the hub"
NOT_OURS, LOST, NOT_RUN = "not ours", "the paper's figure is lost", "not run"
_WORDS: dict[Verdict, str] = {
    "reproduced": "yes", "partly reproduced": "partly", "not reproduced": "no", "open": "open",
}  # fmt: skip
_TOKENS = "after 5, 10, 15, 20, 25B tokens, each ± 0.1 to 0.4: "
# By encoding, of constant tokens, one marked token, odd and even numbers; and our names of these tasks.
_POSITION = {
    "learned": "96.7, 94.3, 97.6",
    "sinusoidal": "98.1, 99.1, 96.2",
    "alibi": "21.7, 26.7, 46.5",
    "T5's bias": "22.4, 24.5, 42.7",
    "rope": "25.3, 24.7, 43.1",
}
_TASKS = ("constant", "marked", "numbers")
_TOKENS_PLACED = 64  # of the sequences of these tasks
# What the paper has beside a claim that no number and no chart of its goes with.
_WITHOUT_NUMBERS = {
    "It goes with FlashAttention": "no timing",
    "It costs little in training": "a slight extra cost",
}
_BETTER = "extrapolates better than softmax"
# Softmax, StableMask, and lm-eval's name.
_DOWNSTREAM = {
    "LAMBADA": (59.4, 59.6, "lambada_openai"),
    "PIQA": (67.1, 67.1, "piqa"),
    "ARC-easy": (51.4, 51.7, "arc_easy"),
    "ARC-challenge": (25.6, 25.6, "arc_challenge"),
    "OpenBookQA": (31.4, 32.6, "openbookqa"),
    "WinoGrande": (53.5, 54.1, "winogrande"),
}


class Row(NamedTuple):
    """A claim, the paper's figure, ours, at which size, the verdict, and the command that measures it."""

    claim: str
    figure: str
    ours: str
    size: str
    verdict: str
    command: str = ""


def first_table(records: dict[str, list[Record]], sections: dict[str, Section]) -> str:
    """Of what the studies have recorded, by study; a study without records is said to be not run.

    What needs a GPU, or is not ours, stands last.
    """
    head = [
        "claim of the paper",
        "the paper's figure",
        "ours",
        "at which size",
        "verdict",
        "command",
    ]
    rows = [*_proved(sections), *_modelled(records), *_ablated(records)]
    rows += [*_placed(records, sections), *_others(sections)]
    rows.sort(key=lambda row: row.verdict in (GPU, NOT_OURS))  # what can be had here first
    return table(head, [[*row[:4], f"**{row.verdict}**", row.command] for row in rows])


def _claimed(sections: dict[str, Section], study: str, begin: str) -> tuple[str, str]:
    """In how many cases a claim of a study holds, and the verdict in a word."""
    for claim in sections[study].claims if study in sections else ():
        if claim.statement.startswith(begin) and claim.holds:
            cases = f"{sum(map(bool, claim.holds))} of {len(claim.holds)} cases"
            return cases, _WORDS[claim.verdict]
    return "", NOT_RUN


def _pretrain(name: str, more: str = "") -> str:
    recipe = f"configs/pretrain/paper-{name}.yaml"
    return f"`stablemask pretrain --config {recipe} --out runs/paper-{name}{more}`"


def _study(name: str) -> str:
    return f"`python -m studies {name}`"


def _proved(sections: dict[str, Section]) -> Iterator[Row]:
    for claim, begin in (
        ("Softmax with relative positions cannot encode absolute position", "Softmax with"),
        ("The mask ratio encodes absolute position", "The mask ratio"),
        ("It has no parameter", "StableMask is parameter-free"),
    ):
        ours, verdict = _claimed(sections, "theory", begin)
        yield Row(claim, "a theorem" if "no parameter" not in claim else "0", ours, "any", verdict, _study("theory"))  # fmt: skip


def _modelled(records: dict[str, list[Record]]) -> Iterator[Row]:
    lower = "Lower perplexity"
    kinds = {"ours": "stablemask", "as published": "stablemask-paper"}
    grid = [record for record in records.get("language", []) if record["group"] == language.GRID]
    for study, when, size, found in (
        ("language", "beginning", "nano and micro, 360 steps", grid),
        ("long", "end", _trained(records, "long"), finals(records.get("long", []))),
    ):
        for words, label in kinds.items():
            leads = _leads(found, label)
            ours = ", ".join(f"{less.text(3)} nats ({preset})" for preset, less in leads.items())
            verdict = _word([less.below(0, SAME) for less in leads.values()]) if leads else NOT_RUN
            yield Row(
                f"{lower}: at the {when}, {words}", LOST, ours, f"{size} of Python, RoPE", verdict, _study(study)
            )  # fmt: skip
    for size in ("wikitext103-71m", "wikitext103-160m", "minipile-160m", "minipile-400m"):
        yield Row(
            f"{lower}: the paper's own shapes and settings, {size}, RoPE or ALiBi", LOST, "", size.partition("-")[2],
            GPU, _pretrain(size, " [--position alibi] [--attention softmax]"),
        )  # fmt: skip
    for kind, figure, more in (
        ("softmax", "15.4, 14.8, 12.4, 11.7, 10.7", " --attention softmax"),
        ("StableMask", "15.0, 14.6, 11.9, 11.3, 10.4", ""),
    ):
        command = _pretrain("pile-1.4b", more)
        yield Row(f"Perplexity on the Pile, {kind}", _TOKENS + figure, "", "1.4b", GPU, command)
    for task, (softmax, stablemask, name) in _DOWNSTREAM.items():
        figure = f"softmax {softmax}, StableMask {stablemask}"
        yield Row(
            f"{task}, after the Pile",
            figure,
            "",
            "1.4b",
            GPU,
            f"`stablemask evaluate --model runs/paper-pile-1.4b --tasks {name}`",
        )


def _leads(records: Sequence[Record], label: str) -> dict[str, Estimate]:
    """Nats less softmax's with RoPE, by size."""
    rope = [record for record in records if record["position"] == "rope"]
    found = {}
    for preset in sizes_of(rope):
        of_size = [record for record in rope if record["preset"] == preset]
        less = difference(by_seed(of_size, label=label), by_seed(of_size, label="softmax"))
        if less is not None:
            found[preset] = less
    return found


def _ablated(records: dict[str, list[Record]]) -> Iterator[Row]:
    """The paper's Table 3; a row holds where ours is below softmax beyond doubt, as the paper's is."""
    names = {
        "softmax": "Pseudo scores all minus infinity: softmax",
        "learned-token": "One trained token in front",
        "fixed-token": "One fixed token in front",
        "stablemask-zero": "Pseudo scores all zero",
        "constant": "Pseudo scores constant, far from the scores' range",
        "stablemask-paper": "Pseudo scores decaying: StableMask",
    }
    ends = finals(records.get("ablation", []))
    for label, name in names.items():
        ours, holds = [], []
        for preset in sizes_of(ends):
            of_size = [record for record in ends if record["preset"] == preset]
            losses, softmax = by_seed(of_size, label=label), by_seed(of_size, label="softmax")
            if not losses:
                continue
            perplexity = estimate([perplexity_of(loss) for loss in losses.values()]).text(2)
            ours.append(f"{perplexity} ({preset})")
            less = difference(losses, softmax)
            if less is not None and label != "softmax":
                holds.append(less.below(0, SAME))
        verdict = NOT_RUN if not ours else _word(holds) if holds else "the base"
        yield Row(
            f"{name} (Table 3)", f"{ablation.PAPER[label]}, MiniPile", ", ".join(ours),
            _trained(records, "ablation"), verdict, _study("ablation"),
        )  # fmt: skip


def _trained(records: dict[str, list[Record]], study: str) -> str:
    """Sizes and steps of the final trainings beside softmax's, those of the plan where none is recorded."""
    plans = {"long": long_training.SIZES["small"], "ablation": ablation.SIZES["small"]}
    compared = [record for record in finals(records.get(study, [])) if record["label"] != "softmax"]
    steps = {record["preset"]: record["steps"] for record in compared}
    steps = steps or {size.preset: size.steps for size in plans[study]}
    return " and ".join(f"{preset}, {count:,} steps" for preset, count in steps.items())


def _word(holds: Sequence[bool | None]) -> str:
    if all(holds):
        return "yes"
    return "partly" if any(holds) else "no" if False in holds else "open"


def _placed(records: dict[str, list[Record]], sections: dict[str, Section]) -> Iterator[Row]:
    """The three position tasks; a row holds in the tasks in which it does what the paper says."""
    results = Results(records.get("position", []))
    yield from (
        _position(results, encoding, "softmax", "softmax", figure, encoding in ABSOLUTE)
        for encoding, figure in _POSITION.items()
    )
    for kind in ("stablemask-paper", "stablemask"):
        for encoding in ("rope", "alibi"):
            words = LABELS[kind] + (", ours" if kind == "stablemask" else "")
            yield _position(results, encoding, kind, words, "a chart", True)


def _position(
    results: Results, encoding: str, kind: str, words: str, figure: str, solves: bool
) -> Row:
    claim = f"Position tasks, {words}, {encoding}"
    if encoding not in (*ABSOLUTE, *ENCODINGS):
        return Row(claim, figure, "", "", NOT_OURS)
    found = {task: results.accuracy(task, encoding, kind, _TOKENS_PLACED) for task in _TASKS}
    known = {task: accuracy for task, accuracy in found.items() if accuracy is not None}
    if not known:
        return Row(claim, figure, "", "", NOT_RUN, _study("position"))
    holds = [
        solved(accuracy) if solves else at_chance(accuracy, task, _TOKENS_PLACED)
        for task, accuracy in known.items()
    ]
    ours = [accuracy.text(1, 100) if accuracy else NOT_RUN for accuracy in found.values()]
    size = f"3 layers of width 64, {_TOKENS_PLACED} tokens"
    return Row(claim, figure, ", ".join(ours), size, _word(holds), _study("position"))


def _others(sections: dict[str, Section]) -> Iterator[Row]:
    for claim, size, study, begin in (
        ("It mends the attention on the first token (figure 1)", "nano", "sinks", "StableMask mends it"),
        ("It mends the attention on punctuation (figure 1)", "nano", "sinks", "Delimiters receive"),
        *(
            (f"It extrapolates {words}", "nano and micro", "extrapolation", f"StableMask {begin}")
            for words, begin in (
                ("as published", f"{_BETTER}, all keys kept, as published"),
                ("as published, log-length scaling for both", f"{_BETTER}, all keys kept, as published, log"),
                ("as published, from a window", f"read from a plain window {_BETTER} read so, as"),
                ("with its mass held, ours", f"{_BETTER}, all keys kept, its mass held"),
                ("with its mass held, log-length scaling for both", f"{_BETTER}, all keys kept, its mass held, our default, log"),
                ("with its mass held, from a window", f"read from a plain window {_BETTER} read so, its"),
            )
        ),
        (
            "It needs no first tokens kept, as StreamingLLM does; its mass held, ours", "nano", "extrapolation",
            "StableMask with a plain window does as well as softmax with StreamingLLM's first tokens, its mass held",
        ),
        ("It costs little in training", "shapes of benchmarks.md", "cost", "It costs nothing in training"),
        ("It generates as fast", "tiny", "cost", "It costs nothing in generating"),
        ("It goes with FlashAttention", "shapes of benchmarks.md", "cost", "It integrates easily"),
    ):  # fmt: skip
        ours, verdict = _claimed(sections, study, begin)
        yield Row(claim, _WITHOUT_NUMBERS.get(claim, "a chart"), ours, size, verdict, _study(study))
