"""No row is timed before its output and gradients are those of what it claims to compute.

The definition is evaluated in float64 for some of the query rows; a gradient that is zero at all others
makes the gradients of keys and values depend on these rows alone. So the very tensors that are timed
are checked, at any length, at the cost of a few rows.

The tolerance is derived: twice the distance of the definition evaluated in the dtype of the row, and
four roundings of the largest term that is summed (as in the tests).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import masks
from .cases import Case, Inputs
from .rows import Row, Run

_ROWS_CHECKED = 64
_TAIL = 50  # pseudo columns of an infinite horizon, in units of 1 / gamma: exp(-50) is left out


class IncorrectError(Exception):
    """A row does not compute what it claims."""


def _pseudo_mass(case: Case, sinks: Tensor, positions: Tensor, horizon: int) -> Tensor:
    """Log of ``sum_{j>i}^{horizon-1} exp(-gamma j)``, summed from its smallest term."""
    column = torch.arange(horizon, dtype=torch.float64, device=positions.device)
    sums = torch.exp(-case.gamma * column).flip(0).cumsum(0).flip(0)
    sums = torch.cat([sums, sums.new_zeros(1)])
    return sums[positions + 1].log().expand(case.heads, -1)


def _infinite(case: Case, sinks: Tensor, positions: Tensor) -> Tensor:
    return _pseudo_mass(case, sinks, positions, case.kv_len + round(_TAIL / case.gamma))


def _finite(case: Case, sinks: Tensor, positions: Tensor) -> Tensor:
    return _pseudo_mass(case, sinks, positions, case.horizon)


def _constant(value: float) -> Callable[[Case, Tensor, Tensor], Tensor]:
    def log_mass(case: Case, sinks: Tensor, positions: Tensor) -> Tensor:
        return torch.full((case.heads, len(positions)), value, device=positions.device)

    return log_mass


def _learned(case: Case, sinks: Tensor, positions: Tensor) -> Tensor:
    return sinks.unsqueeze(-1).expand(-1, len(positions))


# What a row may compute, by the log of the mass beside the real scores: (heads, rows).
LOG_MASSES: dict[str, Callable[[Case, Tensor, Tensor], Tensor]] = {
    "softmax": _constant(-torch.inf),
    "softmax1": _constant(0.0),
    "learned sink": _learned,
    "stablemask": _infinite,
    "stablemask, finite": _finite,
}


def define(case: Case, row: Row, inputs: Inputs, rows: Tensor) -> Tensor:
    """The definition for some query rows, in the dtype of ``inputs``.

    Scores and weights are rounded to that dtype, what is between is float32 or better.

    Returns:
        ``(batch, heads, len(rows), head_dim)``.
    """
    query, key, value, sinks, _ = inputs
    kv_head = torch.arange(case.heads, device=query.device)
    kv_head = kv_head % key.shape[1] if row.tiles_groups else kv_head // case.groups
    key, value = key[:, kv_head], value[:, kv_head]

    bias = masks.dense_bias(case, rows)
    if row.is_floor and case.mask != "causal":
        bias = bias.to(case.torch_dtype)  # the tensor that stock SDPA is given
    precise = torch.promote_types(query.dtype, torch.float32)
    scores = query[:, :, rows] @ key.transpose(-2, -1) * case.head_dim**-0.5
    scores = scores.to(precise) + bias.to(precise)
    mass = LOG_MASSES[row.computes](case, sinks.to(precise), masks.positions(case)[rows])
    mass = mass.to(precise).expand(case.batch, -1, -1).unsqueeze(-1)
    weights = torch.softmax(torch.cat([scores, mass], -1), -1)[..., :-1]
    return weights.to(query.dtype) @ value


class _Truth(NamedTuple):
    exact: Sequence[Tensor]
    allowed: list[float]


def check(case: Case, row: Row, inputs: Inputs, run: Run, *, backward: bool) -> float:
    """Compare a row with the definition, on the tensors that will be timed.

    Returns:
        The largest distance as a share of what is allowed.

    Raises:
        IncorrectError: it is above 1, or not finite.
    """
    rows = torch.linspace(0, case.q_len - 1, min(case.q_len, _ROWS_CHECKED)).long()
    rows = rows.to(inputs.query.device)
    truth = _truth(case, row, inputs, rows, backward)
    grad = torch.zeros_like(inputs.grad)
    grad[:, :, rows] = inputs.grad[:, :, rows]
    out = run()
    actual = [out[:, :, rows]]
    if backward:
        d_query, *others = torch.autograd.grad(out, row.leaves(inputs), grad)
        actual += [d_query[:, :, rows], *others]
    worst = 0.0
    names = ("output", "gradient of query", "of key", "of value", "of the sinks")
    for name, ours, exact, allowed in zip(names, actual, truth.exact, truth.allowed):
        distance = (ours.double() - exact).abs().max().item()
        if not distance <= allowed:
            raise IncorrectError(
                f"{name} is {distance:.1e} from the definition, above {allowed:.1e}"
            )
        worst = max(worst, distance / allowed)
    return worst


def _truth(case: Case, row: Row, inputs: Inputs, rows: Tensor, backward: bool) -> _Truth:
    exact = _results(case, row, inputs, rows, torch.float64, backward)
    rounded = _results(case, row, inputs, rows, case.torch_dtype, backward)
    term = exact[0].abs().max()
    if backward:
        term = max(term, (inputs.grad[:, :, rows].double() * exact[0]).abs().sum(-1).max())
    eps = torch.finfo(case.torch_dtype).eps
    allowed = [
        2 * (low.double() - high).abs().max().item()
        + 4 * eps * max(term.item(), high.abs().max().item())
        for low, high in zip(rounded, exact, strict=True)
    ]
    return _Truth(exact, allowed)


def _results(
    case: Case, row: Row, inputs: Inputs, rows: Tensor, dtype: torch.dtype, backward: bool
) -> Sequence[Tensor]:
    inputs = Inputs(*(t.detach().to(dtype).requires_grad_(backward) for t in inputs))
    out = define(case, row, inputs, rows)
    if not backward:
        return [out]
    d_query, *others = torch.autograd.grad(
        out, row.leaves(inputs), inputs.grad[:, :, rows].detach()
    )
    return [out.detach(), d_query[:, :, rows], *others]
