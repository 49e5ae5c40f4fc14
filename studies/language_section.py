"""What the page says of the study of language modelling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stablemask.evaluation.perplexity import perplexity_of
from stablemask.evaluation.statistics import Estimate, estimate
from stablemask.report.drawing import GRAY

from .kinds import KINDS, LABELS, line_style
from .page import table
from .study import Claim, Record, Section, verdict

POSITIONS = ("rope", "alibi", "nope", "learned")
GRID, TEXT, RATE, GAMMA, ABLATION = "grid", "text", "rate", "gamma", "ablation"
CURVE_TOKENS, FINAL_TOKENS = 8192, 65536  # of validation, during a training and after it

_ByRate = dict[float, dict[int, float]]

# Two losses closer than this are called the same, in nats per token.
SAME = 0.01


def section(records: list[Record]) -> Section:
    """Tables, figures and claims of the records of ``language.jobs``."""
    grid = [record for record in records if record["group"] == GRID]
    presets = list(dict.fromkeys(record["preset"] for record in grid))
    parts = [_setup(records, presets)]
    figures: dict[str, tuple[Figure, str]] = {}
    claims = [_better(grid, presets)]
    for preset in presets:
        of_size = [record for record in grid if record["preset"] == preset]
        parts.append(f"**{preset}**, validation perplexity:\n\n{_perplexities(of_size)}")
    parts.append("{difference}")
    figures["difference"] = (
        _differences_figure(grid, presets),
        "Validation loss less softmax's, by position encoding, attention kind and size",
    )
    parts.append("{curves}")
    figures["curves"] = (
        _curves_figure(grid, presets),
        "Validation loss over training, by attention kind and size, with RoPE",
    )
    text = [record for record in records if record["group"] == TEXT]
    if text:
        parts.append(
            f"On another text ({text[0]['source']}), {text[0]['preset']}:\n\n{_perplexities(text)}"
        )
        claims.append(_better_on_text(text))
    gamma = [record for record in records if record["group"] == GAMMA]
    if gamma:
        parts += [_gamma_table(gamma), "{gamma}"]
        figures["gamma"] = (
            _gamma_figure(gamma),
            "Validation loss less softmax's by gamma times context, at two contexts",
        )
        claims.append(_default_gamma(gamma))
    ablation = [record for record in records if record["group"] == ABLATION]
    if ablation:
        parts.append(_ablation_table(ablation, grid))
        claims += _ablation_claims(ablation, grid)
    rate = [record for record in records if record["group"] == RATE]
    if rate:
        parts.append(_rate_table(rate, grid))
        claims.insert(1, _better_at_the_best_rates(rate, grid))
    return Section(claims, "\n\n".join(parts), figures)


def by_seed(records: Sequence[Record], **wanted: Any) -> dict[int, float]:
    """Validation loss of the records that match, by seed."""
    return {
        record["seed"]: record["loss"]
        for record in records
        if all(record[name] == value for name, value in wanted.items())
    }


def difference(ours: dict[int, float], theirs: dict[int, float]) -> Estimate | None:
    """Of two losses, seed by seed; None where no seed has both."""
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return estimate(pairs) if pairs else None


def _setup(records: list[Record], presets: list[str]) -> str:
    sizes = []
    for preset in presets:
        one = next(r for r in records if r["preset"] == preset and r["group"] == GRID)
        sizes.append(
            f"{preset}: {one['steps']} steps of {one['tokens']:,} tokens, context {one['context']}, learning rate "
            f"{one['learning_rate']:g}"
        )
    return (
        f"Trained from scratch on `{records[0]['source']}`, the source text of Python's standard library, by "
        f"`stablemask pretrain`, all kinds alike but for their attention ({'; '.join(sizes)}). The loss is that of up "
        f"to {FINAL_TOKENS:,} validation tokens of documents held out, in the curves of the first {CURVE_TOKENS:,}. A seed decides the weights and the order of the text. This is the very beginning of a training, in which a kind that gets "
        "going sooner is far ahead. One is better than another where the whole interval of the difference is below 0; "
        f"where only the mean is, by more than {SAME} nats, that stays open."
    )


def _perplexities(records: list[Record]) -> str:
    positions = [p for p in POSITIONS if any(r["position"] == p for r in records)]
    kinds = [k for k in KINDS if any(r["label"] == k for r in records)]
    rows = []
    for kind in kinds:
        cells = []
        for position in positions:
            ours = by_seed(records, position=position, label=kind)
            less = difference(ours, by_seed(records, position=position, label="softmax"))
            cell = estimate([perplexity_of(v) for v in ours.values()]).text(2) if ours else ""
            if ours and less is not None and kind != "softmax":
                cell += f" ({less.text(3)})"
            cells.append(cell)
        rows.append([LABELS[kind], *cells])
    return table(["", *positions], rows) + "\n\nIn brackets: nats per token, less softmax's."


def _better(grid: list[Record], presets: list[str]) -> Claim:
    found = {
        (preset, position): difference(
            by_seed(grid, preset=preset, position=position, label="stablemask"),
            by_seed(grid, preset=preset, position=position, label="softmax"),
        )
        for preset in presets
        for position in POSITIONS
    }
    cells = {key: less for key, less in found.items() if less is not None}
    wins = [less.below(0, SAME) for less in cells.values()]
    won, lost = sum(map(bool, wins)), sum(less.low > 0 for less in cells.values())
    each = ", ".join(f"{p} {e} {less.text(3)}" for (p, e), less in cells.items())
    return Claim(
        "StableMask lowers the perplexity of language models of different sizes and position encodings",
        f"better than softmax beyond doubt in {won} of {len(wins)} designs, worse in {lost}; nats less "
        f"softmax's: {each}",
        verdict(wins),
    )


def _better_on_text(text: list[Record]) -> Claim:
    less = difference(by_seed(text, label="stablemask"), by_seed(text, label="softmax"))
    assert less is not None
    return Claim(
        f"It does so on other text ({text[0]['source']})",
        f"nats less softmax's: {less.text(3)}",
        verdict([less.below(0, SAME)]),
    )


def _gamma_points(gamma: list[Record], context: int) -> dict[float, Estimate]:
    """Loss less softmax's, by gamma x context."""
    here = [record for record in gamma if record["context"] == context]
    base = by_seed(here, label="softmax")
    labels = dict.fromkeys(r["label"] for r in here if r["label"] != "softmax")
    points = {float(label): difference(by_seed(here, label=label), base) for label in labels}
    return {product: less for product, less in sorted(points.items()) if less is not None}


def _contexts(records: list[Record]) -> list[int]:
    return sorted({record["context"] for record in records})


def _gamma_table(gamma: list[Record]) -> str:
    contexts = _contexts(gamma)
    points = {context: _gamma_points(gamma, context) for context in contexts}
    products = sorted({product for found in points.values() for product in found})
    rows = [
        [
            f"{context} tokens",
            *(points[context][p].text(3) if p in points[context] else "" for p in products),
        ]
        for context in contexts
    ]
    head = ["gamma x context", *(f"{product:g}" for product in products)]
    return (
        f"**Which gamma** ({gamma[0]['preset']}, RoPE, infinite horizon): validation loss less softmax's at the same "
        f"context, nats per token:\n\n{table(head, rows)}"
    )


def _default_gamma(gamma: list[Record]) -> Claim:
    """Holds where no other gamma is better than the default by more than ``SAME`` beyond doubt."""
    holds, told = [], []
    for context in _contexts(gamma):
        here = [record for record in gamma if record["context"] == context]
        points = _gamma_points(gamma, context)
        if 1.0 not in points:
            continue
        best = min(points, key=lambda product: points[product].mean)
        less = difference(by_seed(here, label=f"{best:g}"), by_seed(here, label="1"))
        assert less is not None
        clearly_better = less.below(-SAME, SAME)
        holds.append(
            True if best == 1.0 else None if clearly_better is None else not clearly_better
        )
        behind = "" if best == 1.0 else f", {less.text(3)} nats from 1"
        told.append(f"at {context} tokens the best is {best:g}{behind}")
    return Claim(
        "The best gamma is 1 / context, our default",
        "gamma x context: " + "; ".join(told),
        verdict(holds),
    )


def _ablation_table(ablation: list[Record], grid: list[Record]) -> str:
    preset = ablation[0]["preset"]
    same = {"preset": preset, "position": ablation[0]["position"]}
    default, softmax = (by_seed(grid, label=kind, **same) for kind in ("stablemask", "softmax"))
    rows = []
    for label, ours in _ablations(ablation, grid).items():
        against = [difference(ours, theirs) for theirs in (default, softmax)]
        perplexity = estimate([perplexity_of(value) for value in ours.values()]).text(2)
        rows.append([label, perplexity, *(less.text(3) if less else "" for less in against)])
    head = ["the mass", "perplexity", "nats less the default's", "nats less softmax's"]
    return (
        f"**What the mass should be** ({preset}, {ablation[0]['position']}; the default is gamma = 1 / context, infinite "
        f"horizon, every layer). The constant mass is the default's mean over the context:\n\n{table(head, rows)}"
    )


def _ablations(ablation: list[Record], grid: list[Record]) -> dict[str, dict[int, float]]:
    same = {"preset": ablation[0]["preset"], "position": ablation[0]["position"]}
    found = {"default": by_seed(grid, label="stablemask", **same)}
    for kind in ("stablemask-finite", "stablemask-slopes"):
        found[LABELS[kind].partition(", ")[2]] = by_seed(grid, label=kind, **same)
    for label in dict.fromkeys(record["label"] for record in ablation):
        found[label] = by_seed(ablation, label=label)
    found["none: softmax"] = by_seed(grid, label="softmax", **same)
    return {label: losses for label, losses in found.items() if losses}


def _ablation_claims(ablation: list[Record], grid: list[Record]) -> list[Claim]:
    found = _ablations(ablation, grid)
    default = found["default"]
    claims = []
    constant = difference(default, found["constant mass"])
    if constant is not None:
        claims.append(
            Claim(
                "The decay helps, and not the pseudo mass alone: StableMask is better than a constant mass of the same mean",
                f"nats less the constant mass's: {constant.text(3)}",
                verdict([constant.below(0, SAME)]),
            )
        )
    floors = {
        label: less
        for label, losses in found.items()
        if label.startswith("floor") and (less := difference(losses, default)) is not None
    }
    if floors:
        claims.append(
            Claim(
                "A floor under the mass, so that late rows keep one, is better than the default",
                "nats less the default's: "
                + "; ".join(f"{k} {v.text(3)}" for k, v in floors.items()),
                verdict([less.below(0, SAME) for less in floors.values()]),
            )
        )
    return claims


def _by_rate(rate: list[Record], grid: list[Record], preset: str) -> dict[str, _ByRate]:
    """Losses by seed, of each kind of a size by learning rate, in ascending order."""
    own = {"preset": preset, "position": rate[0]["position"]}
    same = [r for r in (*rate, *grid) if all(r[name] == value for name, value in own.items())]
    rates = sorted({record["learning_rate"] for record in same})
    kinds = dict.fromkeys(r["label"] for r in rate if r["preset"] == preset)
    return {
        kind: {value: by_seed(same, label=kind, learning_rate=value) for value in rates}
        for kind in kinds
    }


def _rate_table(rate: list[Record], grid: list[Record]) -> str:
    tables = []
    for preset in dict.fromkeys(record["preset"] for record in rate):
        found = _by_rate(rate, grid, preset)
        rows = [
            [LABELS[kind], *(estimate([*losses.values()]).text(3) for losses in by_rate.values())]
            for kind, by_rate in found.items()
        ]
        rates = next(iter(found.values()))
        tables.append(table([preset, *(f"{value:g}" for value in rates)], rows))
    return (
        "**The learning rate** is the same for every kind, and was chosen for softmax. Half and twice of it, "
        "loss in nats per token:\n\n" + "\n\n".join(tables)
    )


def _better_at_the_best_rates(rate: list[Record], grid: list[Record]) -> Claim:
    wins, told = [], []
    for preset in dict.fromkeys(record["preset"] for record in rate):
        best: dict[str, tuple[float, dict[int, float]]] = {
            kind: min(by_rate.items(), key=lambda item: estimate([*item[1].values()]).mean)
            for kind, by_rate in _by_rate(rate, grid, preset).items()
        }
        (ours_at, ours), (theirs_at, theirs) = best["stablemask"], best["softmax"]
        less = difference(ours, theirs)
        assert less is not None
        wins.append(less.below(0, SAME))
        told.append(f"{preset} {less.text(3)} ({ours_at:g} against {theirs_at:g})")
    return Claim(
        "It does so where either has the best of three learning rates",
        f"nats less softmax's: {'; '.join(told)}",
        verdict(wins),
    )


def _differences_figure(grid: list[Record], presets: list[str]) -> Figure:
    figure = Figure((9.2, 2.9 * len(presets) + 0.7), layout="constrained")
    panels = figure.subplots(len(presets), 1, sharex=True, squeeze=False)[:, 0]
    kinds = [kind for kind in KINDS if kind != "softmax"]
    handles: dict[str, Any] = {}
    for axes, preset in zip(panels, presets, strict=True):
        axes.axhline(0, color=line_style("softmax")["color"], lw=1.4)
        for place, position in enumerate(POSITIONS):
            base = by_seed(grid, preset=preset, position=position, label="softmax")
            for number, kind in enumerate(kinds):
                ours = by_seed(grid, preset=preset, position=position, label=kind)
                less = difference(ours, base)
                if less is None:
                    continue
                style = line_style(kind) | {"ls": ""}
                x = place + 0.13 * (number - (len(kinds) - 1) / 2)
                (handles[kind],) = axes.plot(x, less.mean, **style)
                for seed, loss in ours.items():
                    axes.plot(x, loss - base[seed], **style | {"marker": "."}, alpha=0.5, ms=4)
        axes.set_title(preset)
        axes.set_ylabel("loss less softmax's\n(nats per token)")
    panels[-1].set_xticks(range(len(POSITIONS)), POSITIONS)
    panels[-1].set_xlabel("position encoding; dots: seeds; line: softmax")
    labels = [LABELS[kind] for kind in handles]
    figure.legend(list(handles.values()), labels, loc="outside upper center", ncols=3)
    return figure


def _curves_figure(grid: list[Record], presets: list[str]) -> Figure:
    figure = Figure((4.8 * len(presets), 3.8), layout="constrained")
    panels = figure.subplots(1, len(presets), squeeze=False)[0]
    handles: dict[str, Any] = {}
    for axes, preset in zip(panels, presets, strict=True):
        for kind in KINDS:
            runs = [
                r for r in grid
                if (r["preset"], r["position"], r["label"]) == (preset, "rope", kind)
            ]  # fmt: skip
            if not runs:
                continue
            steps = [step for step, _ in runs[0]["curve"]]
            means = [sum(run["curve"][i][1] for run in runs) / len(runs) for i in range(len(steps))]
            tokens = [step * runs[0]["tokens"] / 1e3 for step in steps]
            (handles[kind],) = axes.plot(tokens, means, **line_style(kind))
        axes.set_title(f"{preset}, RoPE")
        axes.set_xlabel("training (thousand tokens)")
    panels[0].set_ylabel("validation loss (nats per token)")
    labels = [LABELS[kind] for kind in handles]
    figure.legend(list(handles.values()), labels, loc="outside upper center", ncols=3)
    return figure


def _gamma_figure(gamma: list[Record]) -> Figure:
    figure = Figure((7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color=line_style("softmax")["color"], lw=1.4, label="softmax")
    for number, context in enumerate(_contexts(gamma)):
        here = [record for record in gamma if record["context"] == context]
        base = by_seed(here, label="softmax")
        points = _gamma_points(gamma, context)
        look: dict[str, Any] = {
            "color": line_style("stablemask")["color"], "alpha": 1 - 0.35 * number,
        }  # fmt: skip
        look |= {"marker": "os^D"[number % 4], "ls": ("-", "--", ":", "-.")[number % 4]}
        means = [less.mean for less in points.values()]
        axes.plot(list(points), means, label=f"StableMask, context {context}", **look)
        look |= {"marker": ".", "ls": "", "ms": 4, "alpha": 0.5}
        for product in points:
            for seed, loss in by_seed(here, label=f"{product:g}").items():
                axes.plot(product, loss - base[seed], **look)
    axes.axvline(1, color=GRAY, lw=1, ls=":")
    _log_axis(axes)
    axes.set_xlabel("gamma x context; dots: seeds; dotted line: the default")
    axes.set_ylabel("loss less softmax's\n(nats per token)")
    axes.legend()
    return figure


def _log_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    ticks = (0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
