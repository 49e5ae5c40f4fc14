"""Log M by position, as vLLM's steps ask for it, against the definition written out in float64."""

import math

import pytest
import torch

from stablemask.models.settings import complete_settings
from stablemask.vllm.mass import layer_mass, row_positions

HEADS, LAYERS, CONTEXT = 4, 3, 40
RATES = [0.5, 0.1, 0.02, 0.003]
SHIFTS = [[0.5 * head - layer for head in range(HEADS)] for layer in range(LAYERS)]


def log_m(position, rate, horizon=None):
    """Section 2 of the paper: what the columns behind a row add to its sum."""
    if horizon is None:  # a geometric series
        return -(position + 1) * rate - math.log(-math.expm1(-rate))
    columns = range(position + 1, horizon)
    return math.log(sum(math.exp(-rate * j) for j in columns)) if columns else -math.inf


def expected(
    position,
    head,
    layer,
    gamma,
    horizon=None,
    start=0,
    shift=0.0,
    hold=None,
    floor=0.0,
    suffix=False,
):
    if position < start:
        return -math.inf
    rate = 2.0 ** (-8 * (head + 1) / HEADS) if gamma == "slopes" else gamma
    rate = rate[head] if isinstance(rate, list) else rate
    if suffix and position >= horizon - 1:
        return -rate * position
    mass = math.exp(log_m(min(position, math.inf if hold is None else hold), rate, horizon)) + floor
    more = shift[layer][head] if isinstance(shift, list) else shift
    return math.log(mass) + more if mass else -math.inf


@pytest.mark.parametrize(
    "settings",
    [
        {"gamma": 1 / 64, "hold": None},
        {"gamma": 1 / 64, "hold": 20},
        {"gamma": RATES, "hold": 20, "start": 1},
        {"gamma": "slopes", "hold": 5, "shift": -0.5, "start": 8},
        {"gamma": 0.01, "horizon": 15},
        {"gamma": 0.01, "horizon": 15, "floor": 3.0},
        {"gamma": "slopes", "horizon": 15, "suffix": True},
        {"gamma": RATES, "hold": 9, "shift": SHIFTS},
        {"gamma": 0.02, "hold": 9, "shift": SHIFTS, "start": 2},
    ],
    ids=str,
)
def test_the_mass_is_that_of_the_definition(settings):
    complete = complete_settings(settings, HEADS, CONTEXT, LAYERS)
    positions = torch.arange(CONTEXT)
    for layer in range(LAYERS):
        got = layer_mass(complete, HEADS, CONTEXT, layer).at(positions).expand(-1, HEADS)
        wanted = torch.tensor(
            [[expected(i, h, layer, **settings) for h in range(HEADS)] for i in range(CONTEXT)]
        )
        torch.testing.assert_close(got, wanted, rtol=3e-6, atol=3e-6)


def test_a_rank_has_its_own_heads():
    given = {"gamma": RATES, "hold": 9, "shift": SHIFTS}
    settings, positions = complete_settings(given, HEADS, CONTEXT, LAYERS), torch.arange(CONTEXT)
    whole = layer_mass(settings, HEADS, CONTEXT, 1).at(positions)
    ranks = [layer_mass(settings, HEADS, CONTEXT, 1, heads=slice(h, h + 2)) for h in (0, 2)]
    assert torch.equal(torch.cat([mass.at(positions) for mass in ranks], dim=1), whole)


def test_learned_rates_layers_without_a_mass_and_learned_sinks():
    positions = torch.arange(CONTEXT)
    given = {"gamma": "learned", "layers": [0, 2]}
    settings = complete_settings(given, HEADS, CONTEXT, LAYERS, own_decoder=True)
    log_gamma = torch.tensor(RATES).log().repeat(LAYERS, 1) - torch.arange(LAYERS)[:, None]
    none = layer_mass(settings, HEADS, CONTEXT, 1, log_gamma=log_gamma)
    assert none.at(positions).eq(-math.inf).all()
    mass = layer_mass(settings, HEADS, CONTEXT, 2, log_gamma=log_gamma, heads=slice(1, 3))
    rates = [rate * math.exp(-2) for rate in RATES[1:3]]
    wanted = torch.tensor([[log_m(i, rate) for rate in rates] for i in range(CONTEXT)])
    torch.testing.assert_close(mass.at(positions), wanted, rtol=3e-6, atol=3e-6)
    sinks = torch.tensor([0.3, -2.0])
    both = layer_mass(
        settings, HEADS, CONTEXT, 2, log_gamma=log_gamma, heads=slice(1, 3), sinks=sinks
    )
    wanted = torch.tensor([[math.exp(log_m(i, rate)) for rate in rates] for i in range(CONTEXT)])
    torch.testing.assert_close(both.at(positions), (wanted + sinks.exp()).log())


@pytest.mark.parametrize("given", [{"gamma": 0.1}, {"gamma": 0.1, "shift": SHIFTS}])
def test_a_model_that_is_loaded_in_half_precision_has_a_mass_in_float32(given):
    settings = complete_settings(given, HEADS, CONTEXT, LAYERS)
    before = layer_mass(settings, HEADS, CONTEXT, 1), layer_mass(settings, HEADS, 9, 1)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            after = layer_mass(settings, HEADS, CONTEXT, 1), layer_mass(settings, HEADS, 8, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(tensor.dtype == torch.float32 for mass in after for tensor in mass)
    assert all(torch.equal(*pair) for pair in zip(before[0], after[0], strict=True))
    assert torch.equal(after[1].table, before[1].table[:8])


def test_a_row_stands_behind_what_its_request_had():
    rows, lengths = [3, 0, 1, 5], [3, 7, 12, 300]
    starts = torch.tensor([0, 3, 3, 4, 9], dtype=torch.int32)
    wanted = [length - n + i for n, length in zip(rows, lengths) for i in range(n)]
    got = row_positions(starts, torch.tensor(lengths, dtype=torch.int32), 9)
    assert got.tolist() == wanted
    padded = row_positions(starts, torch.tensor(lengths, dtype=torch.int32), 12)
    assert padded[:9].tolist() == wanted
