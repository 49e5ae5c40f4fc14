"""Each task against its definition, token by token."""

import pytest
import torch

from studies.tasks import (
    BLANK,
    COPIED,
    LONGEST_RUN,
    MARK,
    SHORTEST_RUN,
    SYMBOLS,
    TASKS,
)

LENGTH, BATCH = 96, 512


def sample(name, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = TASKS[name].sample(generator, BATCH, LENGTH)
    assert inputs.shape == targets.shape == (BATCH, LENGTH)
    assert inputs.dtype == targets.dtype == torch.long
    return inputs.tolist(), targets.tolist()


DEFINITIONS = {
    "constant": lambda tokens, i: i,
    "runs": lambda tokens, i: i,
    "random": lambda tokens, i: i,
    "marked": lambda tokens, i: tokens.index(MARK) if MARK in tokens[: i + 1] else -100,
    "numbers": lambda tokens, i: list(range(tokens[0] % 2, 2 * LENGTH, 2))[i],
    "even": lambda tokens, i: tokens[i] if i % 2 == 0 else tokens[i - 1],
    "parity": lambda tokens, i: "01".index(bin(i)[-1]),
    "copy": lambda tokens, i: tokens[COPIED] if i >= COPIED else BLANK,
}


@pytest.mark.parametrize("name", TASKS)
def test_every_target_is_the_definitions(name):
    for tokens, targets in zip(*sample(name)):
        assert targets == [DEFINITIONS[name](tokens, i) for i in range(LENGTH)]


@pytest.mark.parametrize("name", TASKS)
def test_classes_hold_symbols_and_answers(name):
    inputs, targets = sample(name)
    assert set().union(*map(set, inputs)) <= set(range(SYMBOLS))
    assert max(map(max, targets)) < TASKS[name].num_classes(LENGTH)


@pytest.mark.parametrize("name", ["constant", "numbers", "parity"])
def test_constant_sequences_repeat_one_symbol(name):
    inputs, _ = sample(name)
    assert all(len(set(tokens)) == 1 for tokens in inputs)
    assert {tokens[0] for tokens in inputs} == set(range(SYMBOLS))


def test_one_token_of_constant_ones_is_marked_anywhere():
    inputs, _ = sample("marked")
    assert all(len({*tokens} - {MARK}) == 1 and tokens.count(MARK) == 1 for tokens in inputs)
    assert {tokens[0] for tokens in inputs} == set(range(SYMBOLS))
    assert {tokens.index(MARK) for tokens in inputs} > {0, LENGTH - 1}


def test_runs_are_long_and_alternate():
    inputs, _ = sample("runs")
    lengths = set()
    for tokens in inputs:
        assert set(tokens) == {0, 1}
        changes = [i for i in range(1, LENGTH) if tokens[i] != tokens[i - 1]]
        lengths.update(end - start for start, end in zip([0, *changes], changes))
        assert LENGTH - changes[-1] <= LONGEST_RUN
    assert min(lengths) == SHORTEST_RUN
    assert max(lengths) == LONGEST_RUN
    assert {tokens[0] for tokens in inputs} == {0, 1}


@pytest.mark.parametrize("name", ["random", "even", "copy"])
def test_random_tokens_are_uniform_and_independent(name):
    tokens = torch.tensor(sample(name)[0])
    share = tokens.flatten().bincount(minlength=SYMBOLS) / tokens.numel()
    assert (share - 1 / SYMBOLS).abs().max() < 0.02
    repeated = (tokens[:, 1:] == tokens[:, :-1]).float().mean()
    assert abs(repeated.item() - 1 / SYMBOLS) < 0.02


@pytest.mark.parametrize("name", TASKS)
def test_chance_is_the_best_guess_without_positions(name):
    """Of the guesses that see the token and the one before it, or one answer for all positions."""
    task = TASKS[name]
    inputs, targets = (torch.tensor(rows) for rows in sample(name))
    scored = targets != -100
    scored[:, : task.first_scored] = False
    guesses = [inputs, inputs.roll(1, 1), *range(SYMBOLS)]
    best = max((guess == targets)[scored].float().mean().item() for guess in guesses)
    assert best == pytest.approx(task.chance(LENGTH), abs=0.03)
