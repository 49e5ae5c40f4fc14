"""What every row trains: the same sizes, weights, batches and precision; and how its steps are timed."""

import time
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from stablemask.models.configuration import StableMaskConfig, preset_config
from stablemask.models.modeling import StableMaskForCausalLM

# Blocks in a batch: on the CPU so that a step takes seconds at most, on CUDA so that it is busy.
BATCH_SIZES = {
    "cpu": {"tiny": 16, "71m": 2, "160m": 1, "410m": 1, "1.4b": 1},
    "cuda": {"tiny": 256, "71m": 64, "160m": 64, "410m": 16, "1.4b": 8},
}
# The same for all, as `stablemask pretrain` has them.
LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP = 1e-3, (0.9, 0.98), 0.1, 1.0
IGNORED = -100


@dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes:
        preset: sizes and context; positions are RoPE, which every row has.
        dtype: ``float32``, or ``bfloat16`` under autocast over float32 weights.
        batch_size: blocks in a step.
        device: ``cpu`` or ``cuda``.
        compile: run every row through torch.compile.
    """

    preset: str
    dtype: str
    batch_size: int
    device: str
    compile: bool = False

    @cached_property
    def config(self) -> StableMaskConfig:
        """That of the softmax rows."""
        return preset_config(self.preset, attention="softmax")

    @property
    def context(self) -> int:
        return self.config.max_position_embeddings

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch_size * self.context

    @property
    def bfloat16(self) -> bool:
        return self.dtype == "bfloat16"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.bfloat16)

    def weights(self) -> dict[str, Tensor]:
        """The same for every row, by the names they have in ours and in Transformers' Llama."""
        torch.manual_seed(0)
        with torch.device(
            self.device
        ):  # here and wherever a row is built: a GPU draws them in no time
            return StableMaskForCausalLM(self.config).state_dict()

    def blocks(self) -> "RandomBlocks":
        return RandomBlocks(self.config.vocab_size, self.batch_size, self.context)


class RandomBlocks(Dataset[dict[str, Tensor]]):
    """One batch of random token ids in memory, over and over, as a Trainer takes it."""

    def __init__(self, vocab_size: int, batch_size: int, context: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(vocab_size, (batch_size, context), generator=generator)

    def __len__(self) -> int:
        return len(self.ids) << 12  # no loop gets to the end of it

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index % len(self.ids)]
        return {"input_ids": ids, "labels": ids}


def next_tokens(ids: Tensor) -> Tensor:
    """What follows each of ``ids``, (batch, length); of the last it is not known, and ignored."""
    return F.pad(ids[:, 1:], (0, 1), value=IGNORED)


class Contender(Protocol):
    """A model in a training loop that goes on from where it stopped."""

    def run(self, steps: int) -> float:
        """Train so many steps; the seconds they took, by a :class:`Clock`."""
        ...

    def loss(self, ids: Tensor) -> Tensor:
        """Of (batch, length) token ids, in the precision the loop trains in."""
        ...

    def parameters(self) -> dict[str, nn.Parameter]: ...

    def gradients(self) -> dict[str, Tensor]:
        """Those that are in the parameters, by the names Llama has for them."""
        ...


class Clock:
    """Started where a loop has its first batch, and stopped where its last step ends.

    What a loop does before its first step, such as making a loader, is not of interest; the data of
    every other step is.
    """

    seconds: float

    def __init__(self, device: str) -> None:
        self._device = device

    def start(self) -> None:
        self._started = self._now()

    def stop(self) -> None:
        self.seconds = self._now() - self._started

    def _now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
