"""Synthetic tasks that need absolute positions: each token of a sequence has an answer of its own.

Position identification and even-token prediction are those of URPE (Luo et al., arXiv 2205.13401); here
even-token prediction looks back only, as a decoder must. The inputs differ in how much they tell of
positions: a repeated token nothing, long runs a little, random tokens the most. Yin et al. have three tasks:
``constant``, ``marked`` and ``numbers``.

Shapes: inputs and targets are (batch, length).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from stablemask.models.loss import IGNORED

SYMBOLS = 8
COPIED = 4  # the position whose token is to be copied
BLANK = SYMBOLS  # the answer before it
MARK = SYMBOLS - 1  # the symbol that stands once among constant ones
UNASKED = IGNORED  # an accuracy leaves out what the loss does
# Tokens of a run of one symbol. The first SHORTEST_RUN positions see no change of symbol.
SHORTEST_RUN, LONGEST_RUN = 16, 32


def constant(generator: Generator, batch: int, length: int) -> Tensor:
    """Each sequence repeats one symbol."""
    symbols = torch.randint(SYMBOLS, (batch, 1), generator=generator)
    return symbols.expand(batch, length).contiguous()


def marked(generator: Generator, batch: int, length: int) -> Tensor:
    """Each sequence repeats one symbol, but for one MARK in a random place."""
    symbols = torch.randint(MARK, (batch, 1), generator=generator)
    places = torch.randint(length, (batch, 1), generator=generator)
    return torch.where(torch.arange(length) == places, MARK, symbols)


def runs(generator: Generator, batch: int, length: int) -> Tensor:
    """Each sequence alternates between two symbols, the first at random, in runs of random lengths."""
    most = -(-length // SHORTEST_RUN)
    lengths = torch.randint(SHORTEST_RUN, LONGEST_RUN + 1, (batch, most), generator=generator)
    first = torch.randint(2, (batch, 1), generator=generator)
    ended = torch.arange(length)[None, :, None] >= lengths.cumsum(-1)[:, None]
    return (first + ended.sum(-1)) % 2


def random(generator: Generator, batch: int, length: int) -> Tensor:
    """Each token is drawn anew from all symbols."""
    return torch.randint(SYMBOLS, (batch, length), generator=generator)


def index(inputs: Tensor) -> Tensor:
    """The token's position."""
    return torch.arange(inputs.shape[1]).repeat(len(inputs), 1)


def index_of_mark(inputs: Tensor) -> Tensor:
    """The position of MARK, from it on: before it there is nothing to be known."""
    place = (inputs == MARK).int().argmax(1, keepdim=True)
    return torch.where(index(inputs) < place, UNASKED, place)


def odd_or_even_numbers(inputs: Tensor) -> Tensor:
    """0, 2, 4 ... of an even symbol, 1, 3, 5 ... of an odd one."""
    return 2 * index(inputs) + inputs % 2


def parity(inputs: Tensor) -> Tensor:
    """0 at even positions, 1 at odd ones."""
    return index(inputs) % 2


def latest_even(inputs: Tensor) -> Tensor:
    """The token at the latest even position: an odd token must know that its own position is odd."""
    return inputs[:, torch.arange(inputs.shape[1]) // 2 * 2]


def copied(inputs: Tensor) -> Tensor:
    """The token at position COPIED, blank before it."""
    return torch.where(index(inputs) < COPIED, BLANK, inputs[:, COPIED, None])


@dataclass(frozen=True)
class Task:
    """What is asked of each token, and of what input.

    Attributes:
        title: for tables.
        inputs: sequences, from a generator, a batch size and a length.
        targets: answers, from sequences.
        chance: accuracy of the best guess that knows nothing of positions, from the training length.
        answers: how many there are, from a length.
        first_scored: the position from which on answers are scored.
    """

    title: str
    inputs: Callable[[Generator, int, int], Tensor]
    targets: Callable[[Tensor], Tensor]
    chance: Callable[[int], float]
    answers: Callable[[int], int] = lambda length: SYMBOLS + 1
    first_scored: int = 0

    def sample(self, generator: Generator, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets."""
        inputs = self.inputs(generator, batch, length)
        return inputs, self.targets(inputs)

    def num_classes(self, length: int) -> int:
        """Answers, and symbols, in sequences of up to ``length`` tokens."""
        return max(self.answers(length), SYMBOLS)


def _indices(length: int) -> int:
    return length


def _one_index(context: int) -> float:
    return 1 / context


TASKS = {
    "constant": Task(
        "position identification, one token repeated", constant, index, _one_index, _indices
    ),
    "runs": Task(
        "position identification, two symbols in long runs", runs, index, _one_index, _indices
    ),
    "random": Task("position identification, random tokens", random, index, _one_index, _indices),
    # The answer 0 is right of all tokens where the mark is the first, and of no other sequence.
    "marked": Task(
        "index of one marked token among constant ones",
        marked,
        index_of_mark,
        lambda context: 2 / (context + 1),
        _indices,
    ),
    "numbers": Task(
        "consecutive odd or even numbers, one token repeated",
        constant,
        odd_or_even_numbers,
        _one_index,
        lambda length: 2 * length,
    ),
    # An even token is its own answer, and an odd one equals it in one of SYMBOLS cases.
    "even": Task(
        "even-token prediction, random tokens",
        random,
        latest_even,
        lambda context: (1 + 1 / SYMBOLS) / 2,
    ),
    "parity": Task(
        "parity of the position, one token repeated", constant, parity, lambda context: 1 / 2
    ),
    "copy": Task(
        "copy of the token at a fixed position, random tokens",
        random,
        copied,
        lambda context: 1 / SYMBOLS,
        first_scored=COPIED,
    ),
}
