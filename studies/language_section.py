"""Language modelling: claims, tables and figures, all from the records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.tables import records_table, table
from stablemask.evaluation.perplexity import perplexity_of
from stablemask.evaluation.statistics import Estimate, estimate
from stablemask.report.drawing import GRAY

from .kinds import KINDS, LABELS, kinds_legend, line_style
from .language import ABLATION, CURVE_TOKENS, FINAL_TOKENS, GAMMA, GRID, POSITIONS, RATE, TEXT
from .study import Claim, Record, Section
from .tables import joined, kinds_table

# Two losses closer than this are called the same, in nats per token.
SAME = 0.01
_TRAINING = (
    ("size", "{preset}"), ("steps", "{steps}"), ("tokens a step", "{tokens:,}"),
    ("context", "{context}"), ("learning rate", "{learning_rate:g}"),
)  # fmt: skip

_Losses = dict[int, float]  # by seed
_Best = tuple[float, float, Estimate]  # the rates of StableMask and softmax, and the difference


def section(records: list[Record]) -> Section:
    """Of the records of ``language.jobs``; the grid is always there, the other groups may not be."""
    grid, text, gamma, ablation, rate = (
        [record for record in records if record["group"] == group]
        for group in (GRID, TEXT, GAMMA, ABLATION, RATE)
    )
    presets = _unique(grid, "preset")
    best_rates = _best_rates(rate, grid)
    best_gammas = _best_gammas(gamma)
    figures = {
        "difference": _differences_figure(grid, presets),
        "curves": _curves_figure(grid, presets),
    }
    if gamma:
        figures["gamma"] = _gamma_figure(gamma)
    return Section(
        _claims(grid, text, ablation, best_rates, best_gammas),
        {
            "trainings": records_table(({r["preset"]: r for r in grid}).values(), _TRAINING),
            "perplexities": joined(_perplexities(grid, preset) for preset in presets),
            "text": joined(_perplexities(text, preset) for preset in _unique(text, "preset")),
            "gamma": _gamma_table(gamma) if gamma else "",
            "best_gamma": _best_gamma_table(best_gammas) if gamma else "",
            "ablation": _ablation_table(ablation, grid) if ablation else "",
            "rates": joined(_rate_table(rate, grid, preset) for preset in _unique(rate, "preset")),
            "best_rates": _best_rates_table(best_rates) if rate else "",
        },
        figures,
        {
            "source": grid[0]["source"],
            "text_source": text[0]["source"] if text else None,
            "smallest": presets[0],
            "curve_tokens": f"{CURVE_TOKENS:,}",
            "final_tokens": f"{FINAL_TOKENS:,}",
            "same": SAME,
        },
    )


def _unique(records: Iterable[Record], field: str) -> list[Any]:
    return list(dict.fromkeys(record[field] for record in records))


def by_seed(records: Sequence[Record], **wanted: Any) -> _Losses:
    """Validation loss of the records that match, by seed."""
    return {
        record["seed"]: record["loss"]
        for record in records
        if all(record[name] == value for name, value in wanted.items())
    }


def difference(ours: _Losses, theirs: _Losses) -> Estimate | None:
    """Of two losses, seed by seed; None where no seed has both."""
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return estimate(pairs) if pairs else None


def _claims(
    grid: list[Record],
    text: list[Record],
    ablation: list[Record],
    best_rates: dict[str, _Best],
    best_gammas: dict[int, tuple[float, Estimate]],
) -> list[Claim]:
    """Each holds where the difference is below 0; :meth:`Estimate.below` says when that is open."""
    found = {
        "StableMask lowers the perplexity of language models of different sizes and position encodings": [
            difference(
                by_seed(grid, preset=preset, position=position, label="stablemask"),
                by_seed(grid, preset=preset, position=position, label="softmax"),
            )
            for preset in _unique(grid, "preset")
            for position in POSITIONS
        ]
    }
    if best_rates:
        statement = "It does so where either has the best of three learning rates"
        found[statement] = [less for *_, less in best_rates.values()]
    if text:
        pair = (by_seed(text, label=kind) for kind in ("stablemask", "softmax"))
        found["It does so on another text"] = [difference(*pair)]
    claims = [Claim(statement, _lower(differences)) for statement, differences in found.items()]
    if best_gammas:
        worse = [less.below(-SAME, SAME) for _, less in best_gammas.values()]
        holds = [
            True if best == 1.0 else None if beaten is None else not beaten
            for (best, _), beaten in zip(best_gammas.values(), worse, strict=True)
        ]
        claims.append(Claim("The best gamma is 1 / context, our default", holds))
    if ablation:
        losses = _ablations(ablation, grid)
        default = losses["default"]
        floors = [losses[label] for label in losses if label.startswith("floor")]
        claims += [
            Claim(
                "The decay helps, and not the pseudo mass alone: StableMask is better than a constant mass of the same mean",
                _lower([difference(default, losses["constant mass"])]),
            ),
            Claim(
                "A floor under the mass, so that late rows keep one, is better than the default",
                _lower(difference(floor, default) for floor in floors),
            ),
        ]
    return claims


def _lower(differences: Iterable[Estimate | None]) -> list[bool | None]:
    return [less.below(0, SAME) for less in differences if less is not None]


def _perplexities(records: list[Record], preset: str) -> str:
    """Perplexity and, in brackets, the loss less softmax's."""
    of_size = [record for record in records if record["preset"] == preset]
    positions = [p for p in POSITIONS if any(r["position"] == p for r in of_size)]

    def cell(kind: str, position: str) -> str:
        ours = by_seed(of_size, position=position, label=kind)
        if not ours:
            return ""
        less = difference(ours, by_seed(of_size, position=position, label="softmax"))
        text = estimate([perplexity_of(loss) for loss in ours.values()]).text(2)
        return text if less is None or kind == "softmax" else f"{text} ({less.text(3)})"

    return kinds_table(preset, positions, cell)


def _gamma_losses(gamma: list[Record]) -> dict[int, tuple[_Losses, dict[float, _Losses]]]:
    """By context: softmax's, and those of each gamma x context."""
    found = {}
    for context in sorted(_unique(gamma, "context")):
        here = [record for record in gamma if record["context"] == context]
        labels = [label for label in _unique(here, "label") if label != "softmax"]
        by_product = {float(label): by_seed(here, label=label) for label in labels}
        found[context] = by_seed(here, label="softmax"), dict(sorted(by_product.items()))
    return found


def _gamma_points(base: _Losses, by_product: dict[float, _Losses]) -> dict[float, Estimate]:
    """Loss less softmax's."""
    points = {product: difference(losses, base) for product, losses in by_product.items()}
    return {product: less for product, less in points.items() if less is not None}


def _gamma_table(gamma: list[Record]) -> str:
    points = {n: _gamma_points(*losses) for n, losses in _gamma_losses(gamma).items()}
    products = sorted({product for found in points.values() for product in found})
    rows = [
        [f"{context} tokens", *(found[p].text(3) if p in found else "" for p in products)]
        for context, found in points.items()
    ]
    return table(["gamma x context", *(f"{product:g}" for product in products)], rows)


def _best_gammas(gamma: list[Record]) -> dict[int, tuple[float, Estimate]]:
    """By context: the best gamma x context, and its loss less that of 1."""
    found = {}
    for context, (base, by_product) in _gamma_losses(gamma).items():
        points = _gamma_points(base, by_product)
        best = min(points, key=lambda product: points[product].mean)
        less = difference(by_product[best], by_product.get(1.0, {}))
        if less is not None:
            found[context] = best, less
    return found


def _best_gamma_table(best: dict[int, tuple[float, Estimate]]) -> str:
    rows = [[f"{n} tokens", f"{product:g}", less.text(3)] for n, (product, less) in best.items()]
    return table(["context", "best gamma x context", "nats less those of 1"], rows)


def _ablation_table(ablation: list[Record], grid: list[Record]) -> str:
    found = _ablations(ablation, grid)
    rows = []
    for label, ours in found.items():
        against = [difference(ours, found[name]) for name in ("default", "none: softmax")]
        perplexity = estimate([perplexity_of(value) for value in ours.values()]).text(2)
        rows.append([label, perplexity, *(less.text(3) if less else "" for less in against)])
    head = ["the mass", "perplexity", "nats less the default's", "nats less softmax's"]
    return table(head, rows)


def _ablations(ablation: list[Record], grid: list[Record]) -> dict[str, _Losses]:
    same = {"preset": ablation[0]["preset"], "position": ablation[0]["position"]}
    found = {"default": by_seed(grid, label="stablemask", **same)}
    for kind in ("stablemask-finite", "stablemask-slopes"):
        found[LABELS[kind].partition(", ")[2]] = by_seed(grid, label=kind, **same)
    for label in _unique(ablation, "label"):
        found[label] = by_seed(ablation, label=label)
    found["none: softmax"] = by_seed(grid, label="softmax", **same)
    return {label: losses for label, losses in found.items() if losses}


def _by_rate(
    rate: list[Record], grid: list[Record], preset: str
) -> dict[str, dict[float, _Losses]]:
    """Of each kind of a size, in ascending order."""
    own = {"preset": preset, "position": rate[0]["position"]}
    same = [r for r in (*rate, *grid) if all(r[name] == value for name, value in own.items())]
    rates = sorted({record["learning_rate"] for record in same})
    return {
        kind: {value: by_seed(same, label=kind, learning_rate=value) for value in rates}
        for kind in _unique((r for r in rate if r["preset"] == preset), "label")
    }


def _rate_table(rate: list[Record], grid: list[Record], preset: str) -> str:
    found = _by_rate(rate, grid, preset)
    rows = [
        [LABELS[kind], *(estimate([*losses.values()]).text(3) for losses in by_rate.values())]
        for kind, by_rate in found.items()
    ]
    return table([preset, *(f"{value:g}" for value in next(iter(found.values())))], rows)


def _best_rates(rate: list[Record], grid: list[Record]) -> dict[str, _Best]:
    """By size."""
    found = {}
    for preset in _unique(rate, "preset"):
        by_kind = _by_rate(rate, grid, preset)
        (ours_at, ours), (theirs_at, theirs) = (
            min(by_kind[kind].items(), key=lambda item: estimate([*item[1].values()]).mean)
            for kind in ("stablemask", "softmax")
        )
        less = difference(ours, theirs)
        assert less is not None
        found[preset] = ours_at, theirs_at, less
    return found


def _best_rates_table(best: dict[str, _Best]) -> str:
    rows = [
        [preset, f"{ours:g}", f"{theirs:g}", less.text(3)]
        for preset, (ours, theirs, less) in best.items()
    ]
    return table(["size", "StableMask's best", "softmax's best", "nats less softmax's"], rows)


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
    kinds_legend(figure, handles)
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
    kinds_legend(figure, handles)
    return figure


def _gamma_figure(gamma: list[Record]) -> Figure:
    figure = Figure((7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color=line_style("softmax")["color"], lw=1.4, label="softmax")
    for number, (context, (base, by_product)) in enumerate(_gamma_losses(gamma).items()):
        points = _gamma_points(base, by_product)
        look: dict[str, Any] = {
            "color": line_style("stablemask")["color"], "alpha": 1 - 0.35 * number,
        }  # fmt: skip
        look |= {"marker": "os^D"[number % 4], "ls": ("-", "--", ":", "-.")[number % 4]}
        means = [less.mean for less in points.values()]
        axes.plot(list(points), means, label=f"StableMask, context {context}", **look)
        look |= {"marker": ".", "ls": "", "ms": 4, "alpha": 0.5}
        for product in points:
            for seed, loss in by_product[product].items():
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
