"""The kinds of attention that every study compares, and how each is drawn."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from stablemask.report.drawing import COLORS, MARKERS

# Yin et al.'s form, "stablemask-paper", has a finite horizon and ALiBi's slopes; the two between have one of them.
KINDS = (
    "softmax",
    "stablemask",
    "stablemask-finite",
    "stablemask-slopes",
    "softmax1",
    "learned-sink",
    "stablemask-paper",
)
LABELS = {
    "softmax": "softmax",
    "stablemask": "StableMask",
    "stablemask-finite": "StableMask, finite horizon",
    "stablemask-slopes": "StableMask, head slopes",
    "softmax1": "softmax-off-by-one",
    "learned-sink": "learned sink",
    "stablemask-paper": "StableMask as published",
}
# The variants of StableMask are blue too; lines and markers tell them apart.
_VARIANTS = {
    "stablemask-finite": ("#8c96c6", "v", "--"),
    "stablemask-slopes": ("#003b5c", "X", ":"),
}


def settings_of(kind: str, context: int) -> dict[str, Any]:
    """``attention``, and the pseudo mass's settings, of a kind at a training context.

    As they stand in :class:`~stablemask.training.pretrain_options.PretrainOptions`.
    """
    if kind == "stablemask-finite":
        return {"attention": "stablemask", "horizon": context}
    if kind == "stablemask-slopes":
        return {"attention": "stablemask", "gamma": "slopes"}
    return {"attention": kind}


def config_fields(kind: str, context: int) -> dict[str, Any]:
    """The same as fields of a :class:`~stablemask.models.StableMaskConfig`."""
    settings = settings_of(kind, context)
    attention = settings.pop("attention")
    return {"attention": attention, "stablemask": settings or None}


def line_style(kind: str) -> dict[str, str]:
    """Colour, marker and line of a kind, the same in every figure."""
    color, marker, line = _VARIANTS.get(kind) or (COLORS[kind], MARKERS[kind], "-")
    return {"color": color, "marker": marker, "ls": line}


def kinds_legend(figure: Figure, handles: dict[str, Any]) -> None:
    """Above the panels, of what has been drawn of each kind."""
    labels = [LABELS[kind] for kind in handles]
    figure.legend(list(handles.values()), labels, loc="outside upper center", ncols=3)
