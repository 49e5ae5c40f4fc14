"""``config.stablemask``: what a model's pseudo mass is, and the sink logits that follow from it."""

import math
import reprlib
import sys
from typing import Any

import torch
from torch import Tensor

from ..pseudo import pseudo_logsumexp
from .kept import rates_on_device, shifts_on_device
from .presets import NAMED_MASSES

_KEYS = ("gamma", "horizon", "suffix", "start", "shift", "hold", "floor", "layers")
LEARNED = "learned"
NEVER = "never"
# A trained shift, (heads,), of an attention module that has one.
SHIFT_PARAMETER = "stablemask_shift"
# What computes the attention of a module in place of `sink_attention`, where it is watched: an attribute,
# for a variable of the context would not reach the threads in which checkpointing computes it again.
WATCHED = "stablemask_attention"


def complete_settings(
    given: dict[str, Any] | None,
    num_heads: int,
    context: int | None,
    num_layers: int | None = None,
    *,
    own_decoder: bool = False,
) -> dict[str, Any]:
    """Check the settings of a model and fill in their defaults.

    Args:
        given: any of

            - ``gamma``: decay rate, a number, a list of one number per query head, ``"slopes"``
              (ALiBi's head slopes), or, in our own decoder, ``"learned"`` (one trained per head and
              layer, from the default on); default ``1 / context``;
            - ``horizon``: number of columns, real and pseudo together; default None, infinitely many.
              Rows from ``horizon - 1`` on are plain softmax;
            - ``suffix``: with a finite horizon, these rows have one pseudo column, of score
              ``-gamma * i``, instead of none; default False;
            - ``start``: the first position that has a pseudo mass; default 0. With 1 the first row,
              which sees only itself, is left alone;
            - ``shift``: added to the log of the mass: a number, or a list for each layer of one number
              per query head; default 0. Far below 0 a head is plain softmax;
            - ``hold``: the last position at which the mass falls, later ones keep it; default with an
              infinite horizon ``context - 1``, so that rows past the training context have a mass
              that was trained. None: it falls for ever. With 0 every row has the mass of row 0;
            - ``floor``: a constant added to the mass of every row, so that it never vanishes; default 0;
            - ``layers``: numbers of the layers that have a mass, in our own decoder; default all.
        num_heads: query heads of the model.
        context: its training context, or None where it names none.
        num_layers: its decoder layers, or None where it names none.
        own_decoder: whether it is ours, which alone can have ``"learned"`` and ``layers``.

    Returns:
        All of ``gamma`` and ``horizon``, ``hold`` where it says anything, and the others where they
        are not their defaults.

    Raises:
        ValueError: the message names the setting, its value and what is allowed.
    """
    given = {} if given is None else given
    if not isinstance(given, dict) or not given.keys() <= set(_KEYS):
        raise ValueError(f"stablemask must be a dict of {', '.join(_KEYS)}, got {given!r}")

    horizon = given.get("horizon")
    if horizon is not None:
        require_positive_int("stablemask['horizon']", horizon, "or None")
    gamma = given.get("gamma")
    if gamma is None:
        if context is None:
            raise ValueError(
                "stablemask['gamma'] must be given, for the model names no max_position_embeddings"
            )
        gamma = 1 / context
    if gamma == LEARNED:
        _require_own_decoder("gamma", gamma, own_decoder)
    elif gamma != "slopes":
        gamma = list(gamma) if isinstance(gamma, (list, tuple)) else gamma
        _check_gamma(gamma, horizon, num_heads, own_decoder)
    settings = {"gamma": gamma, "horizon": horizon}
    suffix = given.get("suffix", False)
    if not isinstance(suffix, bool) or (suffix and horizon is None):
        allowed = "False with an infinite horizon" if suffix is True else "True or False"
        raise ValueError(f"stablemask['suffix'] must be {allowed}, got {suffix!r}")
    if suffix:
        settings["suffix"] = True

    start = given.get("start", 0)
    if not isinstance(start, int) or isinstance(start, bool) or start < 0:
        raise ValueError(f"stablemask['start'] must be an integer of at least 0, got {start!r}")
    shift = _complete_shift(given.get("shift", 0.0), num_heads, num_layers)
    # A finite horizon ends the mass by itself.
    by_default = {} if context is None or horizon is not None else {"hold": context - 1}
    hold = given.get("hold", by_default.get("hold"))
    if hold is not None and (not isinstance(hold, int) or isinstance(hold, bool) or hold < 0):
        raise ValueError(
            f"stablemask['hold'] must be an integer of at least 0, or None (as an option: {NEVER}), got {hold!r}"
        )
    for name, place in (("horizon", horizon), ("start", start), ("hold", hold)):
        if place is not None and place >= 2**63:  # a tensor's ints end there
            raise ValueError(f"stablemask[{name!r}] must be below 2**63, got {place}")
    if hold is not None or by_default:
        settings["hold"] = hold
    floor = given.get("floor", 0.0)
    if not is_number(floor) or floor < 0:
        raise ValueError(f"stablemask['floor'] must be a number of at least 0, got {floor!r}")
    layers = given.get("layers")
    if layers is not None:
        _require_own_decoder("layers", layers, own_decoder)
        settings["layers"] = _check_layers(layers, num_layers)
    if floor:
        settings["floor"] = floor
    if start:
        settings["start"] = start
    if shift:
        settings["shift"] = shift
    return settings


def given_settings(**options: Any) -> dict[str, Any]:
    """Settings from options, of which None is not given; so a ``hold`` of None is ``"never"`` there."""
    given = {name: value for name, value in options.items() if value is not None}
    return {**given, "hold": None} if given.get("hold") == NEVER else given


def named_mass(kind: str, context: int | None) -> dict[str, Any]:
    """Settings of a kind of :data:`~.presets.NAMED_MASSES` at a training context.

    Raises:
        ValueError: no settings have this name.
    """
    if kind not in NAMED_MASSES:
        known = ", ".join(("stablemask", *NAMED_MASSES))
        raise ValueError(f"kind must be one of {known}, got {kind!r}")
    return {"horizon": context, **NAMED_MASSES[kind]}


def pseudo_sink_logits(
    settings: dict[str, Any], num_heads: int, positions: Tensor, gamma: Tensor | None = None
) -> Tensor:
    """Log of the pseudo mass of each row, float32, broadcastable to (batch, heads, q_len).

    Args:
        settings: from :func:`complete_settings`, by :func:`of_layer`.
        num_heads: query heads.
        positions: absolute position of each row, int, (q_len,) or (batch, q_len).
        gamma: the learned one, (heads,), where the settings say so.
    """
    if gamma is None:
        gamma = settings["gamma"]
        if isinstance(gamma, (str, list)):
            gamma = rates_on_device(gamma, num_heads, positions)
    hold = settings.get("hold")
    falling = positions if hold is None else positions.clamp(max=hold)
    suffix = settings.get("suffix", False)
    sink_logits = pseudo_logsumexp(falling, gamma, settings["horizon"], suffix=suffix)
    if "floor" in settings:
        floor = sink_logits.new_full((), math.log(settings["floor"]))
        sink_logits = torch.logaddexp(sink_logits, floor)
    if "shift" in settings:
        shift = settings["shift"]
        if isinstance(shift, list):
            shift = shifts_on_device(tuple(shift), positions)
        sink_logits = sink_logits + shift
    if "start" in settings:
        has_none = (positions < settings["start"]).unsqueeze(-2)
        sink_logits = sink_logits.masked_fill(has_none, -torch.inf)
    return sink_logits


def of_layer(settings: dict[str, Any], layer: Any) -> dict[str, Any]:
    """Settings of one layer, whose ``shift`` is a number or a list of one per head."""
    shift = settings.get("shift")
    return {**settings, "shift": shift[layer]} if isinstance(shift, list) else settings


def without_shift(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings but for the shift, where it is added apart."""
    return {name: value for name, value in settings.items() if name != "shift"}


def in_short(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as a message shows them: of many shifts their range."""
    shift = settings.get("shift")
    if not isinstance(shift, list):
        return settings
    lowest, highest = min(map(min, shift)), max(map(max, shift))
    return {**settings, "shift": f"{lowest:.4g} to {highest:.4g} by layer and head"}


def is_number(value: Any) -> bool:
    # Not math.isfinite: a compiler takes a changed shift as a symbol. An int may be larger than any float.
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max
    )


def require_positive_int(name: str, value: Any, alternative: str = "") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        allowed = f"an integer of at least 1 {alternative}".rstrip()
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def _require_own_decoder(name: str, value: Any, own_decoder: bool) -> None:
    if not own_decoder:
        raise ValueError(f"stablemask[{name!r}] {value!r} needs our own decoder")


def _complete_shift(shift: Any, num_heads: int, num_layers: int | None) -> Any:
    """A number or lists of them; 0 for lists of zeros."""
    # A compiler would trace all numbers in each layer; those of a model were checked when it was made.
    if is_number(shift) or (isinstance(shift, list) and torch.compiler.is_compiling()):
        return shift
    if num_layers is None:
        raise ValueError(f"stablemask['shift'] must be a finite number, got {reprlib.repr(shift)}")
    if not isinstance(shift, (list, tuple)):
        got = reprlib.repr(shift)
    elif wrong := [n for n, row in enumerate(shift) if not _is_row(row, num_heads)]:
        got = f"{reprlib.repr(shift[wrong[0]])} for layer {wrong[0]}"
    elif len(shift) != num_layers:
        got = f"lists for {len(shift)} layers"
    else:
        return [list(row) for row in shift] if any(map(any, shift)) else 0.0
    raise ValueError(
        "stablemask['shift'] must be a finite number, or a list that has for each layer "
        f"({num_layers}) a list of a finite number per query head ({num_heads}), got {got}"
    )


def _is_row(row: Any, num_heads: int) -> bool:
    return isinstance(row, (list, tuple)) and len(row) == num_heads and all(map(is_number, row))


def _check_layers(layers: Any, num_layers: int | None) -> list[int]:
    assert num_layers is not None
    if not isinstance(layers, (list, tuple)) or not set(layers) <= set(range(num_layers)):
        raise ValueError(
            f"stablemask['layers'] must be a list of numbers from 0 to {num_layers - 1}, "
            f"got {layers!r}"
        )
    return sorted(set(layers))


def _check_gamma(gamma: Any, horizon: int | None, num_heads: int, own_decoder: bool) -> None:
    rates = gamma if isinstance(gamma, list) else [gamma]
    if not all(is_number(rate) for rate in rates) or (
        isinstance(gamma, list) and len(gamma) != num_heads
    ):
        learned = f"{LEARNED!r}, " if own_decoder else ""
        raise ValueError(
            f"stablemask['gamma'] must be a number, 'slopes', {learned}or a list of one number per head "
            f"({num_heads}), got {gamma!r}"
        )
    if min(rates) < 0 or (min(rates) == 0 and horizon is None):
        allowed = "greater than 0 with an infinite horizon" if horizon is None else "at least 0"
        raise ValueError(f"stablemask['gamma'] must be {allowed}, got {gamma!r}")
