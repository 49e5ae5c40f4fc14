"""What the method rests on, checked by machine: with symbols and fractions, never floating point.

Each statement is a function that says whether it holds; ``docs/method.md`` has the proofs on paper.

Letters, as there: i a row, j a column, n the horizon, Z the real mass, M the pseudo mass, c a constant
mass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise, product
from typing import Literal, NamedTuple

import sympy as sp

_ROW = sp.Symbol("i", integer=True, nonnegative=True)
_COLUMN = sp.Symbol("j", integer=True, nonnegative=True)
_HORIZON = sp.Symbol("n", integer=True, positive=True)
_GAMMA, _VALUE = sp.Symbol("gamma", positive=True), sp.Symbol("v", real=True)
_SCORE = sp.Symbol("s", real=True)
_REAL, _CONSTANT = sp.symbols("Z c", positive=True)

Mass = Callable[[sp.Expr], sp.Expr]


def infinite_mass(row: sp.Expr) -> sp.Expr:
    return sp.exp(-_GAMMA * (row + 1)) / (1 - sp.exp(-_GAMMA))


def finite_mass(row: sp.Expr) -> sp.Expr:
    return infinite_mass(row) * (1 - sp.exp(-_GAMMA * (_HORIZON - 1 - row)))


def equal_scores_mass(row: sp.Expr) -> sp.Expr:
    """The real mass of a row whose scores are all s."""
    return (row + 1) * sp.exp(_SCORE)


def equal_values_average_to_themselves() -> bool:
    weight = sp.IndexedBase("w", positive=True)
    average = _weighted_sum(weight, _VALUE) / _weighted_sum(weight, sp.S.One)
    return sp.simplify(average) == _VALUE


def identical_tokens_stay_identical() -> bool:
    """Two layers, each of any norm, values, scores, output projection and MLP, over rows of any length."""
    state: sp.Expr = sp.Symbol("x", real=True)
    for layer in range(2):
        norm, value, project, mlp = (sp.Function(f"{f}{layer}") for f in ("f", "g", "h", "k"))
        weight = sp.IndexedBase(f"w{layer}", positive=True)
        attended = _weighted_sum(weight, value(norm(state))) / _weighted_sum(weight, sp.S.One)
        state += project(sp.simplify(attended))
        state += mlp(state)
    return _ROW not in state.free_symbols


def share_rises_with_either_mass() -> bool:
    """The whole of the argument: Z grows by z, M shrinks by m, and ``z M + Z m + z m`` decides."""
    grown, lost = sp.symbols("z m", nonnegative=True)
    left = sp.Symbol("M", nonnegative=True)  # of M in the later row
    rise = _share(_REAL + grown, left) - _share(_REAL, left + lost)
    sign = grown * left + _REAL * lost + grown * lost
    size = (_REAL + grown + left) * (_REAL + left + lost)
    some_grown, some = sp.symbols("z_+ a", positive=True)
    return (
        _vanishes(rise - sign / size)
        and sign.subs({grown: some_grown, lost: some}).is_positive is True
        and sign.subs({grown: some_grown, left: some}).is_positive is True
        and sign.subs({left: 0, lost: 0}) == 0  # softmax
    )


def mass_is_the_sum_of_its_columns() -> bool:
    """From the last row up: none there, and each row has one column more than the next."""
    log_mass = (
        -(_ROW + 1) * _GAMMA
        + sp.log(1 - sp.exp(-_GAMMA * (_HORIZON - 1 - _ROW)))
        - sp.log(1 - sp.exp(-_GAMMA))
    )
    return (
        finite_mass(_HORIZON - 1) == 0
        and _vanishes(_loss(finite_mass) - sp.exp(-_GAMMA * (_ROW + 1)))
        and _vanishes(sp.exp(log_mass) - finite_mass(_ROW))
        and _vanishes(sp.limit(finite_mass(_ROW), _HORIZON, sp.oo) - infinite_mass(_ROW))
        and _vanishes(
            finite_mass(_ROW) - infinite_mass(_ROW) + infinite_mass(_HORIZON - 1)
        )
    )  # fmt: skip


def share_rises_infinite_horizon() -> bool:
    return _share_rises(infinite_mass) and sp.limit(infinite_mass(_ROW), _ROW, sp.oo) == 0


def share_rises_finite_horizon() -> bool:
    flat = _HORIZON - 1 - _ROW  # gamma = 0
    return (
        _share_rises(finite_mass)
        and _share_rises(lambda row: flat.subs(_ROW, row))
        and _share(equal_scores_mass(_HORIZON - 1), finite_mass(_HORIZON - 1)) == 1
    )


def share_rises_head_slopes() -> bool:
    head = sp.Symbol("h", integer=True, nonnegative=True)
    heads = sp.Symbol("H", integer=True, positive=True)
    slope = sp.Integer(2) ** (-8 * (head + 1) / heads)
    fall = _loss(infinite_mass).subs(_GAMMA, slope)
    return slope.is_positive is True and _vanishes(fall - sp.exp(-slope * (_ROW + 1)))


def share_rises_constant_sink() -> bool:
    share = [_share(equal_scores_mass(row), _CONSTANT) for row in (_ROW, _ROW + 1)]
    return _positive(share[1] - share[0])


def share_rises_relative_scores() -> bool:
    """Of identical tokens: a score is any function of the distance. The first rows, all scores free."""
    score = sp.Function("f", real=True)

    def real_mass(row: int) -> sp.Expr:
        return sp.Add(*(sp.exp(score(row - column)) for column in range(row + 1)))

    gains = [real_mass(row + 1) - real_mass(row) for row in range(8)]
    return all(
        gain == sp.exp(score(row + 1)) and gain.is_positive for row, gain in enumerate(gains)
    )


def share_rises_in_fractions() -> bool:
    """The paper's two matrices, rows of numbers, with e^-gamma and every e^score a fraction."""
    n = 9
    ratios = (Fraction(1, 2), Fraction(9, 10), Fraction(999, 1000), Fraction(1))
    by_distance = [Fraction(7, 3), Fraction(1, 9), Fraction(5), *[Fraction(2, 7)] * (n - 3)]
    for ratio, scores in product(ratios, ([Fraction(1, 3)] * n, [Fraction(5)] * n, by_distance)):
        shares = []
        for row in range(n):
            real = [scores[row - column] for column in range(row + 1)]
            pseudo = [ratio**column for column in range(row + 1, n)]
            shares.append(sum(real) / sum(real + pseudo))
        if not (all(a < b for a, b in pairwise(shares)) and shares[-1] == 1):
            return False
    return True


def norm_keeps_the_share() -> bool:
    """``x + r u`` has another direction for every r, unless u is parallel to x: the wedge product."""
    x, u = (sp.Matrix(sp.symbols(f"{name}:2", real=True)) for name in "xu")
    first, second = sp.symbols("r_0 r_1", real=True)
    wedge = sp.Matrix.hstack(x + first * u, x + second * u).det()
    return _vanishes(wedge - (second - first) * sp.Matrix.hstack(x, u).det())


def late_rows_without_a_floor() -> bool:
    """Whether its real scores are low (Z bounded) or equal to those of early rows."""
    masses = (_REAL, equal_scores_mass(_ROW))
    return all(_last_share(real, infinite_mass(_ROW)) == 1 for real in masses)


def late_rows_with_a_floor() -> bool:
    floored = infinite_mass(_ROW) + _CONSTANT
    limit = _share(_REAL, _CONSTANT)
    return (
        _vanishes(_last_share(_REAL, floored) - limit)
        and _positive(1 - limit)
        and _positive(sp.diff(limit, _REAL))  # so that a bound of Z bounds the share
        and _last_share(equal_scores_mass(_ROW), floored) == 1
    )


def size_of_the_mass() -> bool:
    """In multiples k of 1 / gamma: M is e^-k / gamma there, the smaller gamma the closer."""
    multiple = sp.Symbol("k", positive=True)
    return sp.limit(_GAMMA * infinite_mass(multiple / _GAMMA), _GAMMA, 0, "+") == sp.exp(-multiple)


def stock_backward_is_exact() -> bool:
    """Two rows of heads two wide, every number a symbol, against the derivatives of the definition."""
    rows, width = 2, 2
    query, key, value, grad = (_matrix(name, rows, width) for name in ("q", "k", "v", "g"))
    sink, scale = _matrix("m", rows, 1), sp.Symbol("alpha", positive=True)
    scores = scale * query * key.T
    weights = scores.applyfunc(sp.exp).multiply_elementwise(sp.ones(rows).lower_triangular())
    real = [sp.Add(*weights.row(row)) for row in range(rows)]
    masses = [real[row] + sp.exp(sink[row]) for row in range(rows)]
    loss = sp.Add(*grad.multiply_elementwise(_divide_rows(weights * value, masses)))

    # The kernel's output, scaled, and what its backward makes of it and of the joint lse.
    joint = [sp.log(mass) for mass in masses]
    scale_down = [sp.exp(joint[row] - sp.log(real[row])) for row in range(rows)]
    out = _divide_rows(_divide_rows(weights * value, real), scale_down)
    probability = _divide_rows(weights, [sp.exp(lse) for lse in joint])
    row_sum = sp.Matrix([grad.row(row).dot(out.row(row)) for row in range(rows)])
    d_score = probability.multiply_elementwise(grad * value.T - row_sum * sp.ones(1, rows))
    d_sink = sp.Matrix([-sp.exp(sink[row] - joint[row]) * row_sum[row] for row in range(rows)])
    returned = (
        (query, scale * d_score * key),
        (key, scale * d_score.T * query),
        (value, probability.T * grad),
        (sink, d_sink),
    )
    return all(
        _cancels(sp.diff(loss, variable) - gradient)
        for variables, gradients in returned
        for variable, gradient in zip(variables, gradients)
    )


def _weighted_sum(weight: sp.IndexedBase, term: sp.Expr) -> sp.Expr:
    """Over the columns of row i, up to its own."""
    return sp.Sum(weight[_ROW, _COLUMN] * term, (_COLUMN, 0, _ROW))


def _share(real: sp.Expr, mass: sp.Expr) -> sp.Expr:
    return real / (real + mass)


def _last_share(real: sp.Expr, mass: sp.Expr) -> sp.Expr:
    return sp.simplify(sp.limit(_share(real, mass), _ROW, sp.oo))


def _loss(mass: Mass) -> sp.Expr:
    """Of the mass, from a row to the next."""
    return mass(_ROW) - mass(_ROW + 1)


def _share_rises(mass: Mass) -> bool:
    """What :func:`share_rises_with_either_mass` asks for, where all scores are equal."""
    gain = equal_scores_mass(_ROW + 1) - equal_scores_mass(_ROW)
    return _positive(gain) and _positive(_loss(mass))


def _vanishes(expression: sp.Expr) -> bool:
    return sp.simplify(expression) == 0


def _positive(expression: sp.Expr) -> bool:
    numerator, denominator = sp.fraction(sp.factor(sp.simplify(expression)))
    return (sp.expand(numerator) / denominator).is_positive is True


def _cancels(expression: sp.Expr) -> bool:
    """Of sums, products and quotients of exponentials: the numerator over one denominator is empty."""
    numerator = sp.numer(sp.together(sp.expand_power_exp(expression)))
    return sp.expand(sp.powsimp(sp.expand(numerator))) == 0


def _matrix(name: str, rows: int, columns: int) -> sp.Matrix:
    return sp.Matrix(rows, columns, sp.symbols(f"{name}:{rows}:{columns}", real=True))


def _divide_rows(matrix: sp.Matrix, divisors: Sequence[sp.Expr]) -> sp.Matrix:
    return sp.Matrix(*matrix.shape, lambda row, column: matrix[row, column] / divisors[row])


class Statement(NamedTuple):
    """A sentence, how it is checked, and the check."""

    text: str
    method: Literal["symbolic", "exact"]
    check: Callable[[], bool]


STATEMENTS = {
    "equal values": Statement(
        "A row of positive weights that sum to one maps identical values to that value.",
        "symbolic", equal_values_average_to_themselves,
    ),
    "identical tokens": Statement(
        "So softmax layers, with any scores, norms and MLPs, give identical tokens one output.",
        "symbolic", identical_tokens_stay_identical,
    ),
    "rise": Statement(
        "The real share $Z / (Z + M)$ rises strictly if $Z$ rises and $M > 0$ does not, or if $M$ falls and "
        "$Z$ does not; in softmax, with $M = 0$, it cannot.",
        "symbolic", share_rises_with_either_mass,
    ),
    "rise, infinite horizon": Statement(
        "Equal scores, infinite horizon, any $\\gamma > 0$: $Z$ rises and $M$ falls strictly.",
        "symbolic", share_rises_infinite_horizon,
    ),
    "rise, finite horizon": Statement(
        "Equal scores, finite horizon, any $\\gamma \\ge 0$: the same, up to a share of 1 in its last row.",
        "symbolic", share_rises_finite_horizon,
    ),
    "rise, head slopes": Statement(
        "Each head slope $2^{-8(h+1)/H}$ is such a $\\gamma$.",
        "symbolic", share_rises_head_slopes,
    ),
    "rise, constant sink": Statement(
        "Equal scores, a constant mass (softmax-off-by-one, a learned sink): the share rises strictly "
        "as well, without any decay.",
        "symbolic", share_rises_constant_sink,
    ),
    "rise, relative scores": Statement(
        "Scores that are any function of the distance (identical tokens in a first layer, RoPE, ALiBi): "
        "$Z$ rises strictly.",
        "symbolic", share_rises_relative_scores,
    ),
    "rise in fractions": Statement(
        "The paper's matrices, built from fractions: shares rise strictly, up to 1.",
        "exact", share_rises_in_fractions,
    ),
    "norm": Statement(
        "A norm behind the residual sum does not undo it: $x + r u$ has another direction for every $r$ "
        "(unless $u$ is parallel to $x$).",
        "symbolic", norm_keeps_the_share,
    ),
    "closed form": Statement(
        "The closed form of $\\log M$ is the sum of its columns, finite horizon; infinite, its limit.",
        "symbolic", mass_is_the_sum_of_its_columns,
    ),
    "backward": Statement(
        "The stock backward, given the joint logsumexp, returns the exact $dq$, $dk$, $dv$; the "
        "logit's gradient is $-M / (Z + M) \\cdot D$.",
        "symbolic", stock_backward_is_exact,
    ),
    "size of the mass": Statement(
        "At row $k / \\gamma$ the mass is $e^{-k} / \\gamma$, in the limit of small $\\gamma$.",
        "symbolic", size_of_the_mass,
    ),
    "late rows": Statement(
        "Infinite horizon: the share tends to 1 in late rows, even of scores so low that $Z$ is bounded.",
        "symbolic", late_rows_without_a_floor,
    ),
    "late rows, floor": Statement(
        "With a floor, $M + c$, it tends to 1 with equal scores, and to $Z / (Z + c) < 1$ where $Z$ is "
        "bounded: late rows keep a pseudo mass.",
        "symbolic", late_rows_with_a_floor,
    ),
}  # fmt: skip
