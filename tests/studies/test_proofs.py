"""Every statement holds, none of them whatever one asserts, and they speak of the package's own mass."""

import inspect
import types

import pytest
import sympy as sp
import torch

from stablemask import pseudo_logsumexp
from studies import proofs

# Slips that must not pass: a statement, what stands in its check, what is put there.
SLIPS = [
    ("equal values", "weight, sp.S.One)", "weight, sp.S.One) + infinite_mass(_ROW)"),
    ("identical tokens", "state += mlp(state)", "state += mlp(_ROW * state)"),
    ("rise", "sign = grown * left +", "sign = 2 * grown * left +"),
    ("rise, infinite horizon", "exp(-_GAMMA * (row + 1))", "exp(_GAMMA * (row + 1))"),
    ("rise, finite horizon", "exp(-_GAMMA * (row + 1))", "exp(_GAMMA * (row + 1))"),
    ("rise, finite horizon", "- 1 - _ROW  # gamma = 0", "- 1 + _ROW"),
    ("rise, head slopes", "slope = sp.Integer(2)", "slope = -sp.Integer(2)"),
    ("rise, constant sink", "(equal_scores_mass(row), _CONSTANT)", "(equal_scores_mass(row), 0)"),
    ("rise, relative scores", "score(row - column)", "score(row + column)"),
    ("rise in fractions", "range(row + 1, n)", "range(0)"),
    ("norm", "x + second * u", "second * (x + u)"),
    ("closed form", "(_HORIZON - 1 - row)", "(_HORIZON - row)"),
    ("closed form", "-(_ROW + 1) * _GAMMA", "-_ROW * _GAMMA"),
    ("backward", "value.T - row_sum", "value.T - 2 * row_sum"),
    ("backward", "[sp.log(mass) for mass in masses]", "[sp.log(mass) for mass in real]"),
    ("backward", "[-sp.exp(sink[row] - joint", "[sp.exp(sink[row] - joint"),
    ("size of the mass", "multiple / _GAMMA", "2 * multiple / _GAMMA"),
    ("late rows", "(real, infinite_mass(_ROW))", "(real, infinite_mass(_ROW) + _CONSTANT)"),
    ("late rows, floor", "infinite_mass(_ROW) + _CONSTANT", "infinite_mass(_ROW)"),
]


@pytest.mark.parametrize("name", proofs.STATEMENTS)
def test_statement_holds(name):
    assert proofs.STATEMENTS[name].check() is True


@pytest.mark.parametrize(("name", "stands", "put"), SLIPS)
def test_a_slip_is_found(name, stands, put):
    source = inspect.getsource(proofs)
    assert stands in source
    slipped = types.ModuleType("slipped")
    exec(source.replace(stands, put), slipped.__dict__)
    assert slipped.STATEMENTS[name].check() is False


@pytest.mark.parametrize("gamma", ["1/1000", "1/8", "3"])
def test_the_masses_are_those_of_the_package(gamma):
    rate, rows, horizon = sp.Rational(gamma), [0, 1, 5, 40], 42
    for mass, ends in ((proofs.infinite_mass, None), (proofs.finite_mass, horizon)):
        exact = [
            sp.log(mass(sp.Integer(row)).subs({proofs._GAMMA: rate, proofs._HORIZON: horizon}))
            for row in rows
        ]
        expected = torch.tensor([float(value.evalf(30)) for value in exact])
        actual = pseudo_logsumexp(torch.tensor(rows), float(rate), ends)[0]
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
