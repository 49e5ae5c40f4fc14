"""The page of an inspection: one model on a text, or two side by side."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from .. import __version__
from ..evaluation.perplexity import perplexity_text
from ..evaluation.sinks import even_first_token
from ..models.settings import in_short
from .drawing import COLORS, lines
from .inspection import Inspection
from .inspection_figures import (
    PANEL_HEIGHT,
    PANEL_WIDTH,
    head_map,
    layer_figures,
    ratio_panels,
    sink_figures,
)
from .page import SINK, listed, printable, render

MEANINGS = {
    "tokens read": "of the text, and the token in front of it; all that is below comes from these",
    "perplexity of them": "among how many tokens the model is torn, on average; lower is better",
    "attention on the first token": "share of a row, mean over layers, heads and the rows after the first, which sees "
    "nothing else",
    "mask ratio": "share of a row that goes to the pseudo mass, or to a learned sink, mean over layers, heads and rows",
    "largest activation": "size of the largest hidden feature behind any layer, in the model's own units",
    "... but for the first token": "the same without the first token, where massive activations live",
    "largest kurtosis of a layer": "how heavy the tails of its hidden features are; 3 for a normal distribution",
}


def render_inspection(inspections: Sequence[Inspection]) -> str:
    """The whole page, of one model or two."""
    has_pseudo = any(one.pseudo for one in inspections)
    return render(
        "inspection.html",
        title=f"Inside {listed([one.label for one in inspections])}",
        takeaway=takeaway(inspections),
        caveat=_caveat(inspections),
        inspections=inspections,
        has_pseudo=has_pseudo,
        legend=list(
            zip([one.label for one in inspections], lines([one.attention for one in inspections]))
        ),
        rows=summary_rows(inspections),
        meanings=MEANINGS,
        charts=list(layer_figures(inspections)),
        first_token=sink_figures(inspections),
        first_token_text=" ".join(map(_most_on_first_token, inspections)),
        panels=ratio_panels(inspections) if has_pseudo else [],
        panel={"width": PANEL_WIDTH, "height": PANEL_HEIGHT},
        longest=max(len(one.tokens) for one in inspections),
        shares=[_shares(one) for one in inspections],
        layers=list(_layers(inspections, has_pseudo)),
        made=f"Made by stablemask {__version__}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}.",
    )


def summary_rows(inspections: Sequence[Inspection]) -> list[tuple[str, list[str]]]:
    """The table: a name, and a value of each model."""

    def row(name: str, value: Callable[[Inspection], str]) -> tuple[str, list[str]]:
        return name, [value(one) for one in inspections]

    return [
        row("family", lambda one: one.family),
        row("attention", attention_in_words),
        row("parameters", lambda one: f"{one.parameters:,} in {one.dtype}"),
        row("layers × heads", _sizes),
        row("tokens read", _tokens_read),
        row(
            "in front of the text",
            lambda one: "nothing" if one.prefix is None else printable(one.prefix),
        ),
        row("perplexity of them", lambda one: perplexity_text(one.perplexity)),
        row("attention on the first token", lambda one: f"{one.first_token:.1%}"),
        row("mask ratio", lambda one: f"{one.pseudo:.1%}"),
        row("largest activation", lambda one: _peak(one.outliers.largest)),
        row("... but for the first token", lambda one: _peak(one.outliers.largest_later)),
        row("largest kurtosis of a layer", lambda one: _peak(one.outliers.kurtosis)),
    ]


def attention_in_words(inspection: Inspection) -> str:
    """Such as "stablemask: gamma 0.001, infinite horizon"."""
    settings = inspection.settings
    if settings is None:
        return inspection.attention
    gamma = settings["gamma"]
    words = [
        f"gamma {gamma:.4g}" if isinstance(gamma, float | int)
        else "gamma of ALiBi's slopes" if gamma == "slopes"
        else "learned gamma" if gamma == "learned"
        else f"gamma {min(gamma):.4g} to {max(gamma):.4g} by head",
        "infinite horizon" if settings["horizon"] is None else f"horizon {settings['horizon']:,}",
    ]  # fmt: skip
    if settings.get("suffix"):
        words.append("one column behind it")
    if settings.get("start"):
        words.append(f"from position {settings['start']}")
    if shift := in_short(settings).get("shift"):
        words.append(f"log mass shifted by {shift if isinstance(shift, str) else f'{shift:.4g}'}")
    if settings.get("hold") is not None:
        words.append(f"constant from position {settings['hold']}")
    if "floor" in settings:
        words.append(f"floor {settings['floor']:.4g}")
    if "layers" in settings:
        words.append(f"in layers {', '.join(map(str, settings['layers']))}")
    return f"{inspection.attention}: {', '.join(words)}"


def takeaway(inspections: Sequence[Inspection]) -> str:
    """Where attention goes, in one sentence."""
    found = []
    for one in inspections:
        above, even = _sink_layers(one), even_first_token(len(one.tokens))
        found.append(
            f"{one.label} gives its first token {one.first_token:.1%} of its attention, where an even spread gives "
            f"{even:.1%}, and {f'makes it a sink in {above} of {len(one.layers)} layers' if above else 'has no sink'}"
            + (f"; {one.pseudo:.1%} goes to its pseudo mass" if one.pseudo else "")
        )
    return "; ".join(found) + "."


def _caveat(inspections: Sequence[Inspection]) -> str:
    lengths = listed(list(dict.fromkeys(f"{len(one.text_tokens):,}" for one in inspections)))
    return (
        f"This is one text of {lengths} tokens: it does not show how others are read, how good a model is, or "
        "what it does with what it attends to."
    )


def _sink_layers(inspection: Inspection) -> int:
    """How many layers make the first token a sink."""
    least = SINK * even_first_token(len(inspection.tokens))
    return sum(float(layer.first_token.mean()) > least for layer in inspection.layers)


def _most_on_first_token(inspection: Inspection) -> str:
    means = {layer.layer: float(layer.first_token.mean()) for layer in inspection.layers}
    most = max(means, key=means.__getitem__)
    return (
        f"In {inspection.label} layer {most} gives the first token most, {means[most]:.1%}; "
        f"{_sink_layers(inspection)} of {len(means)} layers give it more than {SINK} times the "
        f"{even_first_token(len(inspection.tokens)):.1%} of an even spread."
    )


def _shares(inspection: Inspection) -> dict[str, list[float | None]]:
    """Of each token: the mask ratio of its row, where there is one, and what it receives."""
    pseudo, received = (
        torch.stack([getattr(layer, name).mean(0) for layer in inspection.layers]).mean(0).tolist()
        for name in ("pseudo", "received")
    )
    return {"pseudo": pseudo if inspection.pseudo else [], "received": [*received, None]}


def _layers(inspections: Sequence[Inspection], has_pseudo: bool) -> Iterator[dict[str, Any]]:
    """Each layer number with the maps of its heads; the one with most on a first token is open."""
    by_layer: dict[int, list[tuple[Inspection, int]]] = {}
    for one in inspections:
        for index, layer in enumerate(one.layers):
            by_layer.setdefault(layer.layer, []).append((one, index))
    first = {
        number: max(float(one.layers[index].first_token.mean()) for one, index in found)
        for number, found in by_layer.items()
    }
    for number, found in sorted(by_layer.items()):
        heads = max(len(one.maps[index].real) for one, index in found)
        yield {
            "number": number,
            "is_open": number == max(first, key=first.__getitem__),
            "digests": [(COLORS[one.attention], _digest(one, index)) for one, index in found],
            "heads": [
                [_map(one, index, head, has_pseudo) for one, index in found]
                for head in range(heads)
            ],
        }


def _digest(inspection: Inspection, index: int) -> str:
    layer = inspection.layers[index]
    pseudo = f", pseudo mass {layer.pseudo.mean():.0%}" if inspection.pseudo else ""
    return f"first token {layer.first_token.mean():.0%}{pseudo}"


def _map(inspection: Inspection, index: int, head: int, has_pseudo: bool) -> dict[str, str] | None:
    maps, layer = inspection.maps[index], inspection.layers[index]
    if head >= len(maps.real):
        return None
    return {
        "uri": head_map(maps.real[head], maps.pseudo[head], has_pseudo),
        "text": f"{inspection.label}, layer {layer.layer}, head {head}: first token "
        f"{layer.first_token[head]:.1%}, pseudo mass {layer.pseudo[head].mean():.1%}",
    }


def _sizes(inspection: Inspection) -> str:
    heads = {len(layer.first_token) for layer in inspection.layers}
    return f"{len(inspection.layers)} × {' or '.join(map(str, sorted(heads)))}"


def _tokens_read(inspection: Inspection) -> str:
    read, total = len(inspection.tokens), inspection.total_tokens
    return f"{read:,}" if read == total else f"{read:,} of {total:,}"


def _peak(by_layer: Tensor) -> str:
    layer = int(by_layer.argmax())
    size = float(by_layer[layer])
    return f"{size:,.0f} (layer {layer})" if size >= 100 else f"{size:.3g} (layer {layer})"
