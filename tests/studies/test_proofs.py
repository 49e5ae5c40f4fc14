"""What the method rests on, proved with symbols and fractions, never floating point.

``docs/method.md`` has the proofs on paper, and ``docs/results.md`` names the tests. Each proof is changed
in turn to see it fail, and the mass they speak of is the package's own.

Letters, as there: i a row, j a column, n the horizon, Z the real mass, M the pseudo mass, c a constant
mass.
"""

import inspect
import re
import sys
from fractions import Fraction
from itertools import pairwise, product

import pytest
import sympy as sp
import torch

from stablemask import pseudo_logsumexp
from studies.page import text_of

_ROW = sp.Symbol("i", integer=True, nonnegative=True)
_COLUMN = sp.Symbol("j", integer=True, nonnegative=True)
_HORIZON = sp.Symbol("n", integer=True, positive=True)
_GAMMA, _VALUE = sp.Symbol("gamma", positive=True), sp.Symbol("v", real=True)
_SCORE = sp.Symbol("s", real=True)
_REAL, _CONSTANT = sp.symbols("Z c", positive=True)


def infinite_mass(row):
    return sp.exp(-_GAMMA * (row + 1)) / (1 - sp.exp(-_GAMMA))


def finite_mass(row):
    return infinite_mass(row) * (1 - sp.exp(-_GAMMA * (_HORIZON - 1 - row)))


def equal_scores_mass(row):
    """The real mass of a row whose scores are all s."""
    return (row + 1) * sp.exp(_SCORE)


def test_equal_values_average_to_themselves():
    weight = sp.IndexedBase("w", positive=True)
    average = _weighted_sum(weight, _VALUE) / _weighted_sum(weight, sp.S.One)
    assert sp.simplify(average) == _VALUE


def test_identical_tokens_stay_identical():
    """Two layers, each of any norm, values, scores, output projection and MLP, over rows of any length."""
    state = sp.Symbol("x", real=True)
    for layer in range(2):
        norm, value, project, mlp = (sp.Function(f"{f}{layer}") for f in ("f", "g", "h", "k"))
        weight = sp.IndexedBase(f"w{layer}", positive=True)
        attended = _weighted_sum(weight, value(norm(state))) / _weighted_sum(weight, sp.S.One)
        state += project(sp.simplify(attended))
        state += mlp(state)
    assert _ROW not in state.free_symbols


def test_the_share_rises_with_either_mass():
    """The whole of the argument: Z grows by z, M shrinks by m, and ``z M + Z m + z m`` decides."""
    grown, lost = sp.symbols("z m", nonnegative=True)
    left = sp.Symbol("M", nonnegative=True)  # of M in the later row
    rise = _share(_REAL + grown, left) - _share(_REAL, left + lost)
    sign = grown * left + _REAL * lost + grown * lost
    size = (_REAL + grown + left) * (_REAL + left + lost)
    some_grown, some = sp.symbols("z_+ a", positive=True)
    assert _vanishes(rise - sign / size)
    assert sign.subs({grown: some_grown, lost: some}).is_positive
    assert sign.subs({grown: some_grown, left: some}).is_positive
    assert sign.subs({left: 0, lost: 0}) == 0  # softmax


def test_the_mass_is_the_sum_of_its_columns():
    """From the last row up: none there, and each row has one column more than the next."""
    log_mass = (
        -(_ROW + 1) * _GAMMA
        + sp.log(1 - sp.exp(-_GAMMA * (_HORIZON - 1 - _ROW)))
        - sp.log(1 - sp.exp(-_GAMMA))
    )
    assert finite_mass(_HORIZON - 1) == 0
    assert _vanishes(_loss(finite_mass) - sp.exp(-_GAMMA * (_ROW + 1)))
    assert _vanishes(sp.exp(log_mass) - finite_mass(_ROW))
    assert _vanishes(sp.limit(finite_mass(_ROW), _HORIZON, sp.oo) - infinite_mass(_ROW))
    assert _vanishes(finite_mass(_ROW) - infinite_mass(_ROW) + infinite_mass(_HORIZON - 1))


def test_the_share_rises_with_an_infinite_horizon():
    assert _share_rises(infinite_mass)
    assert sp.limit(infinite_mass(_ROW), _ROW, sp.oo) == 0


def test_the_share_rises_with_a_finite_horizon():
    flat = _HORIZON - 1 - _ROW  # gamma = 0
    assert _share_rises(finite_mass)
    assert _share_rises(lambda row: flat.subs(_ROW, row))
    assert _share(equal_scores_mass(_HORIZON - 1), finite_mass(_HORIZON - 1)) == 1


def test_the_share_rises_with_head_slopes():
    head = sp.Symbol("h", integer=True, nonnegative=True)
    heads = sp.Symbol("H", integer=True, positive=True)
    slope = sp.Integer(2) ** (-8 * (head + 1) / heads)
    fall = _loss(infinite_mass).subs(_GAMMA, slope)
    assert slope.is_positive
    assert _vanishes(fall - sp.exp(-slope * (_ROW + 1)))


def test_the_share_rises_with_a_constant_sink():
    share = [_share(equal_scores_mass(row), _CONSTANT) for row in (_ROW, _ROW + 1)]
    assert _positive(share[1] - share[0])


def test_the_share_rises_with_relative_scores():
    """Of identical tokens: a score is any function of the distance. The first rows, all scores free."""
    score = sp.Function("f", real=True)

    def real_mass(row):
        return sp.Add(*(sp.exp(score(row - column)) for column in range(row + 1)))

    for row in range(8):
        gain = real_mass(row + 1) - real_mass(row)
        assert gain == sp.exp(score(row + 1))
        assert gain.is_positive


def test_the_share_rises_in_fractions():
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
        assert all(a < b for a, b in pairwise(shares))
        assert shares[-1] == 1


def test_a_norm_keeps_the_share():
    """``x + r u`` has another direction for every r, unless u is parallel to x: the wedge product."""
    x, u = (sp.Matrix(sp.symbols(f"{name}:2", real=True)) for name in "xu")
    first, second = sp.symbols("r_0 r_1", real=True)
    wedge = sp.Matrix.hstack(x + first * u, x + second * u).det()
    assert _vanishes(wedge - (second - first) * sp.Matrix.hstack(x, u).det())


def test_late_rows_without_a_floor():
    """Whether its real scores are low (Z bounded) or equal to those of early rows."""
    masses = (_REAL, equal_scores_mass(_ROW))
    assert [_last_share(real, infinite_mass(_ROW)) for real in masses] == [1, 1]


def test_late_rows_with_a_floor():
    floored = infinite_mass(_ROW) + _CONSTANT
    limit = _share(_REAL, _CONSTANT)
    assert _vanishes(_last_share(_REAL, floored) - limit)
    assert _positive(1 - limit)
    assert _positive(sp.diff(limit, _REAL))  # so that a bound of Z bounds the share
    assert _last_share(equal_scores_mass(_ROW), floored) == 1


def test_the_size_of_the_mass():
    """In multiples k of 1 / gamma: M is e^-k / gamma there, the smaller gamma the closer."""
    multiple = sp.Symbol("k", positive=True)
    assert sp.limit(_GAMMA * infinite_mass(multiple / _GAMMA), _GAMMA, 0, "+") == sp.exp(-multiple)


def test_the_stock_backward_is_exact():
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
    for variables, gradients in returned:
        for variable, gradient in zip(variables, gradients):
            assert _cancels(sp.diff(loss, variable) - gradient)


def _weighted_sum(weight, term):
    """Over the columns of row i, up to its own."""
    return sp.Sum(weight[_ROW, _COLUMN] * term, (_COLUMN, 0, _ROW))


def _share(real, mass):
    return real / (real + mass)


def _last_share(real, mass):
    return sp.simplify(sp.limit(_share(real, mass), _ROW, sp.oo))


def _loss(mass):
    """Of the mass, from a row to the next."""
    return mass(_ROW) - mass(_ROW + 1)


def _share_rises(mass):
    """What the test of either mass asks for, where all scores are equal."""
    gain = equal_scores_mass(_ROW + 1) - equal_scores_mass(_ROW)
    return _positive(gain) and _positive(_loss(mass))


def _vanishes(expression):
    return sp.simplify(expression) == 0


def _positive(expression):
    numerator, denominator = sp.fraction(sp.factor(sp.simplify(expression)))
    return (sp.expand(numerator) / denominator).is_positive is True


def _cancels(expression):
    """Of sums, products and quotients of exponentials: the numerator over one denominator is empty."""
    numerator = sp.numer(sp.together(sp.expand_power_exp(expression)))
    return sp.expand(sp.powsimp(sp.expand(numerator))) == 0


def _matrix(name, rows, columns):
    return sp.Matrix(rows, columns, sp.symbols(f"{name}:{rows}:{columns}", real=True))


def _divide_rows(matrix, divisors):
    return sp.Matrix(*matrix.shape, lambda row, column: matrix[row, column] / divisors[row])


@pytest.mark.parametrize("gamma", ["1/1000", "1/8", "3"])
def test_the_masses_are_those_of_the_package(gamma):
    rate, rows, horizon = sp.Rational(gamma), [0, 1, 5, 40], 42
    for mass, ends in ((infinite_mass, None), (finite_mass, horizon)):
        exact = [
            sp.log(mass(sp.Integer(row)).subs({_GAMMA: rate, _HORIZON: horizon})) for row in rows
        ]
        expected = torch.tensor([float(value.evalf(30)) for value in exact])
        actual = pseudo_logsumexp(torch.tensor(rows), float(rate), ends)[0]
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


# Slips that must not pass: a proof, what stands in it, what is put there.
SLIPS = [
    ("equal_values_average_to_themselves", "weight, sp.S.One)", "weight, sp.S.One) + infinite_mass(_ROW)"),
    ("identical_tokens_stay_identical", "state += mlp(state)", "state += mlp(_ROW * state)"),
    ("the_share_rises_with_either_mass", "sign = grown * left +", "sign = 2 * grown * left +"),
    ("the_share_rises_with_an_infinite_horizon", "exp(-_GAMMA * (row + 1))", "exp(_GAMMA * (row + 1))"),
    ("the_share_rises_with_a_finite_horizon", "exp(-_GAMMA * (row + 1))", "exp(_GAMMA * (row + 1))"),
    ("the_share_rises_with_a_finite_horizon", "- 1 - _ROW  # gamma = 0", "- 1 + _ROW"),
    ("the_share_rises_with_head_slopes", "slope = sp.Integer(2)", "slope = -sp.Integer(2)"),
    ("the_share_rises_with_a_constant_sink", "(equal_scores_mass(row), _CONSTANT)", "(equal_scores_mass(row), 0)"),
    ("the_share_rises_with_relative_scores", "score(row - column)", "score(row + column)"),
    ("the_share_rises_in_fractions", "range(row + 1, n)", "range(0)"),
    ("a_norm_keeps_the_share", "x + second * u", "second * (x + u)"),
    ("the_mass_is_the_sum_of_its_columns", "(_HORIZON - 1 - row)", "(_HORIZON - row)"),
    ("the_mass_is_the_sum_of_its_columns", "-(_ROW + 1) * _GAMMA", "-_ROW * _GAMMA"),
    ("the_stock_backward_is_exact", "value.T - row_sum", "value.T - 2 * row_sum"),
    ("the_stock_backward_is_exact", "[sp.log(mass) for mass in masses]", "[sp.log(mass) for mass in real]"),
    ("the_stock_backward_is_exact", "[-sp.exp(sink[row] - joint", "[sp.exp(sink[row] - joint"),
    ("the_size_of_the_mass", "multiple / _GAMMA", "2 * multiple / _GAMMA"),
    ("late_rows_without_a_floor", "(real, infinite_mass(_ROW))", "(real, infinite_mass(_ROW) + _CONSTANT)"),
    ("late_rows_with_a_floor", "infinite_mass(_ROW) + _CONSTANT", "infinite_mass(_ROW)"),
]  # fmt: skip


@pytest.mark.parametrize(("proof", "stands", "put"), SLIPS)
def test_a_slip_is_found(proof, stands, put):
    proofs = inspect.getsource(sys.modules[__name__]).partition("\nSLIPS = ")[0]
    assert stands in proofs
    slipped: dict = {"__name__": __name__}
    exec(proofs.replace(stands, put), slipped)
    with pytest.raises(AssertionError):
        slipped[f"test_{proof}"]()


def test_the_page_names_every_proof():
    named = re.findall(r"`test_(\w+)`", text_of("theory"))
    assert sorted(named) == sorted({proof for proof, *_ in SLIPS})
    assert all(f"test_{proof}" in globals() for proof in named)
