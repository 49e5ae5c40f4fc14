"""What the teacher and the student read of a text: the same, but for the teacher's prefix.

The student reads what the tokenizer or the chat template makes of a text. The teacher reads it with the
prefix in front, unless the text begins with it. Padding is on the right, where causal attention never sees
it, so neither needs a mask. Shapes: B batch, n tokens.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from ...data.chat import IGNORED


@dataclass(frozen=True)
class Reading:
    """How one batch is read.

    Attributes:
        teacher: (B, n + 1), or (B, n) where there is no prefix.
        has_prefix: which texts begin with the prefix themselves, (B,).
    """

    teacher: Tensor
    has_prefix: Tensor
    prefix: int | None

    @classmethod
    def of(cls, input_ids: Tensor, prefix: int | None) -> "Reading":
        """``input_ids``: the student's, (B, n)."""
        if prefix is None:
            return cls(input_ids, torch.ones_like(input_ids[:, 0], dtype=torch.bool), None)
        has_prefix = input_ids[:, 0] == prefix
        in_front = F.pad(input_ids, (1, 0), value=prefix)
        at_end = F.pad(input_ids, (0, 1), value=prefix)  # a token that no other sees
        return cls(torch.where(has_prefix[:, None], at_end, in_front), has_prefix, prefix)

    def rows(self, of_teacher: Tensor, dim: int = 1) -> Tensor:
        """Of what the teacher made, the rows of the student's tokens.

        Args:
            of_teacher: batch first, as many rows along ``dim`` as ``teacher`` has.
        """
        if self.prefix is None:
            return of_teacher
        length = of_teacher.shape[dim] - 1
        shape = [-1] + [1] * (of_teacher.dim() - 1)
        return torch.where(
            self.has_prefix.view(shape),
            of_teacher.narrow(dim, 0, length),
            of_teacher.narrow(dim, 1, length),
        )


def front_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What a tokenizer puts before a plain text, such as a begin token; nothing with many."""
    bare: Any = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole: Any = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    return []


class Texts(Dataset[dict[str, Tensor]]):
    """Texts as examples to train on, with the front that their tokenizer gives each unless it has it already.

    Args:
        tokens: ``(texts, length)``, int.
        front: token ids.
    """

    def __init__(self, tokens: np.ndarray, front: list[int]) -> None:
        self.tokens, self.front = tokens, front

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.from_numpy(self.tokens[index].astype(np.int64))
        return in_front(self.front, {"input_ids": ids, "labels": ids})

    @property
    def num_tokens(self) -> int:
        return self.tokens.size


class InFront(Dataset[dict[str, Tensor]]):
    """The examples of another dataset, each with a front as of :class:`Texts`."""

    def __init__(self, dataset: Any, front: list[int]) -> None:
        self.dataset, self.front = dataset, front

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return in_front(self.front, self.dataset[index])

    @property
    def num_tokens(self) -> int:
        return self.dataset.num_tokens


def in_front(front: list[int], example: dict[str, Tensor]) -> dict[str, Tensor]:
    """An example with ``front`` before its tokens, unless they begin with it; it is not scored."""
    ids = example["input_ids"]
    if not front or ids[: len(front)].tolist() == front:
        return example
    return {
        "input_ids": torch.cat((ids.new_tensor(front), ids)),
        "labels": F.pad(example["labels"], (len(front), 0), value=IGNORED),
    }


def spread(dataset: Any, most: int) -> list[dict[str, Tensor]]:
    """Examples from all over a dataset."""
    count = min(most, len(dataset))
    return [dataset[i * len(dataset) // count] for i in range(count)]
