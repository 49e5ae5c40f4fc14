import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stablemask import dense_stable_mask, head_decay_rates, mask_ratio, pseudo_logsumexp

GAMMAS = [1e-4, 1e-3, 0.01, 0.1, 1.0, 10.0]


@pytest.mark.parametrize("gamma", [0.0, *GAMMAS])
@pytest.mark.parametrize("n", [1, 2, 7, 300])
def test_finite_horizon_equals_the_logsumexp_of_the_dense_scores(gamma, n):
    causal, pseudo = dense_stable_mask(n, gamma)
    dense = pseudo[0].masked_fill(causal.bool(), -torch.inf).logsumexp(-1)
    log_mass = pseudo_logsumexp(torch.arange(n), gamma, horizon=n)[0]
    assert log_mass[-1] == -torch.inf
    torch.testing.assert_close(log_mass.double()[:-1], dense[:-1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("position", [0, 1, 999, 10**5, 10**6])
def test_infinite_horizon_equals_a_long_sum(gamma, position):
    # Relative to its first term the sum is the same in every row: 60 / gamma terms are all of it.
    terms = -gamma * torch.arange(int(60 / gamma) + 2, dtype=torch.float64)
    expected = terms.logsumexp(0).item() - gamma * (position + 1)
    actual = pseudo_logsumexp(torch.tensor([position]), gamma)[0, 0].item()
    assert math.isclose(actual, expected, rel_tol=1e-6, abs_tol=1e-6)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_finite_horizon_tends_to_the_infinite_one(gamma):
    positions = torch.tensor([0, 3, 50])
    near = pseudo_logsumexp(positions, gamma, horizon=51 + int(60 / gamma) + 2)
    torch.testing.assert_close(near, pseudo_logsumexp(positions, gamma), rtol=1e-6, atol=1e-6)


@given(
    gamma=st.floats(1e-4, 10.0),
    horizon=st.integers(0, 10**6),
    position=st.integers(0, 10**6),
)
def test_finite_mass_for_any_row(gamma, horizon, position):
    log_mass = pseudo_logsumexp(torch.tensor([position]), gamma, horizon)[0, 0].item()
    columns = horizon - 1 - position
    if columns <= 0:
        assert log_mass == -math.inf
        return
    used = min(columns, int(60 / gamma) + 2)
    terms = -gamma * torch.arange(used, dtype=torch.float64)
    expected = terms.logsumexp(0).item() - gamma * (position + 1)
    assert math.isclose(log_mass, expected, rel_tol=1e-6, abs_tol=1e-6)


def test_shapes_follow_positions_and_gamma():
    flat, batched = torch.arange(5), torch.arange(10).view(2, 5)
    per_head = head_decay_rates(4)
    assert pseudo_logsumexp(flat, 0.1).shape == (1, 5)
    assert pseudo_logsumexp(flat, per_head).shape == (4, 5)
    assert pseudo_logsumexp(batched, 0.1).shape == (2, 1, 5)
    assert pseudo_logsumexp(batched, per_head).shape == (2, 4, 5)
    assert pseudo_logsumexp(flat, per_head).dtype == torch.float32
    torch.testing.assert_close(
        pseudo_logsumexp(batched, per_head)[1], pseudo_logsumexp(batched[1], per_head)
    )


@pytest.mark.parametrize(
    ("rates", "horizon"),
    [([0.3, 1.2], None), ([0.3, 1.2], 9), ([0.0, 1e-17], 9), ([1e-7, 1e-6], 9), ([1e-4, 1e-3], 9)],
)
def test_gamma_has_the_gradient_of_the_dense_scores(rates, horizon):
    gamma = torch.tensor(rates, dtype=torch.float64, requires_grad=True)
    rows = torch.arange(8)
    weights = torch.randn(2, 8, dtype=torch.float64)
    log_mass = pseudo_logsumexp(rows, gamma, horizon).double()
    (actual,) = torch.autograd.grad((log_mass * weights).sum(), gamma)
    length = horizon or 400
    column = torch.arange(length, dtype=torch.float64)
    scores = (-gamma.view(2, 1, 1) * column).masked_fill(column <= rows.unsqueeze(-1), -torch.inf)
    exact = scores.logsumexp(-1)
    torch.testing.assert_close(log_mass, exact, rtol=1e-6, atol=1e-6)
    (expected,) = torch.autograd.grad((exact * weights).sum(), gamma)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_gradient_is_finite_where_the_mass_has_ended():
    gamma = torch.tensor([0.0, 0.5], requires_grad=True)
    log_mass = pseudo_logsumexp(torch.arange(6), gamma, horizon=4)
    log_mass[log_mass.isfinite()].sum().backward()
    assert gamma.grad.isfinite().all()


def test_head_decay_rates_are_alibis_slopes():
    expected = torch.tensor([0.5, 0.25, 0.125, 0.0625, 2**-5, 2**-6, 2**-7, 2**-8])
    torch.testing.assert_close(head_decay_rates(8), expected, rtol=0, atol=0)


def test_a_rate_that_is_not_checked_shows():
    """Transforms, compilers and GPUs keep its value to themselves."""

    def of_rates(rates, horizon):
        return torch.func.vmap(lambda rate: pseudo_logsumexp(torch.arange(3), rate, horizon))(rates)

    for horizon in (None, 9):
        assert of_rates(torch.tensor([[-1.0], [-1e-9], [torch.nan]]), horizon).isnan().all()
    assert (of_rates(torch.zeros(1, 1), None) == torch.inf).all()


def test_a_gamma_may_be_any_int():
    torch.testing.assert_close(
        pseudo_logsumexp(torch.arange(3), 10**30), pseudo_logsumexp(torch.arange(3), 1e30)
    )


def test_dense_mask_is_the_papers_figure():
    causal, pseudo = dense_stable_mask(3, 2.0, dtype=torch.float32)
    assert causal.tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert pseudo.tolist() == [[[0, -2, -4], [0, 0, -4], [0, 0, 0]]]
    assert dense_stable_mask(4, head_decay_rates(2))[1].shape == (2, 4, 4)


def test_mask_ratio_is_the_share_of_the_sink():
    ratio = mask_ratio(torch.tensor([0.0, math.log(3.0)]), torch.zeros(2))
    torch.testing.assert_close(ratio, torch.tensor([0.5, 0.25]))


@pytest.mark.parametrize(
    ("arguments", "error", "names"),
    [
        ((torch.arange(3), 0.0), ValueError, "gamma"),
        ((torch.arange(3), -1.0), ValueError, "gamma"),
        ((torch.arange(3), -1.0, 8), ValueError, "gamma"),
        ((torch.arange(3), float("nan")), ValueError, "gamma"),
        ((torch.arange(3), float("inf")), ValueError, "gamma must be a finite number, got inf"),
        ((torch.arange(3), float("inf"), 8), ValueError, "gamma must be a finite number, got inf"),
        (
            (torch.arange(3), torch.tensor([0.1, float("inf")])),
            ValueError,
            "gamma must be a finite",
        ),
        ((torch.arange(3), torch.tensor([0.1, float("nan")])), ValueError, "gamma"),
        ((torch.arange(3), torch.tensor([0.1, -0.1])), ValueError, "gamma"),
        ((torch.arange(3), torch.ones(2, 2)), ValueError, "gamma"),
        ((torch.arange(3), "slopes"), TypeError, "gamma"),
        ((torch.arange(3), 0.1, -1), ValueError, "horizon"),
        ((torch.arange(3), 0.1, 3.0), TypeError, "horizon"),
        ((torch.arange(3), 0.1, 10**30), ValueError, "horizon must be .* below 2.*63, got 10{30}$"),
        ((torch.arange(3), 10**400), ValueError, "gamma must be a finite number, got 1"),
        ((torch.arange(3.0), 0.1), TypeError, "positions"),
        (([0, 1], 0.1), TypeError, "positions"),
        ((torch.tensor([True]), 0.1), TypeError, "positions"),
        ((torch.zeros(1, 1, 1, dtype=torch.int64), 0.1), ValueError, "positions"),
    ],
)
def test_bad_arguments_are_named(arguments, error, names):
    with pytest.raises(error, match=names):
        pseudo_logsumexp(*arguments)


@pytest.mark.parametrize("n", [-1, 3.0, None, 10**30])
def test_a_dense_mask_has_a_number_of_columns(n):
    with pytest.raises(ValueError, match="n must be an int of at least 0"):
        dense_stable_mask(n, 0.1)


@pytest.mark.parametrize("heads", [0, -1, 2.0])
def test_head_decay_rates_wants_a_positive_count(heads):
    with pytest.raises(ValueError, match="num_heads"):
        head_decay_rates(heads)
