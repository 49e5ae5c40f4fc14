"""Steps that would harm the weights are left out."""

import math
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ...backends import hardware
from ...errors import RunError

WINDOW = 128  # accepted steps that a loss is compared with
LEAST = 32  # of them, before any comparison


@dataclass(frozen=True)
class _Outcome:
    """Of a step: its loss, norm and whether it was left out, all in ``numbers``, which waits for them."""

    step: int
    numbers: Callable[[], list[float]]
    mean: float
    deviation: float
    tells: bool


class SkipBadSteps(TrainerCallback, ExportableState):
    """Skips a step whose loss or gradients are not finite, and on request one whose loss is a spike.

    A skipped step leaves the weights, the optimizer's moments and the logged loss as they were. It counts
    as a step: its data is used up, and the learning rate moves on. Each is a line on stderr and a row of
    the record; their number goes into each log as ``skipped``. All processes decide alike, for the loss is
    averaged over them. What earlier losses were, and what was skipped, is saved with checkpoints.

    The device decides, and the optimizer, a fused one of PyTorch's, leaves the step out there. The host
    learns of it before the next step, a log or a checkpoint, so that it runs ahead of a GPU meanwhile.

    Args:
        step_loss: this process's loss of the step, as it went into the gradients.
        grad_norm: norm of the step's gradients before clipping, the same on every process.
        limit: how many steps in a row may be skipped; the last of them ends the run.
        spikes: skip a loss more than this many standard deviations above the mean of the last 128
            accepted ones, once there are 32; 0 for none.
        record: gets a row for each skipped step.

    Raises:
        RunError: ``limit`` steps in a row were skipped.
        ValueError: the optimizer cannot leave a step out.
    """

    def __init__(
        self,
        step_loss: Callable[[], Tensor],
        grad_norm: Callable[[], Tensor],
        *,
        limit: int = 10,
        spikes: float = 0.0,
        record: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self._step_loss = step_loss
        self._grad_norm = grad_norm
        self._limit = limit
        self._spikes = spikes
        self._record = record
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.skipped = self.in_a_row = 0
        self._logged: list[float] = []  # accepted losses since the last log
        self._outcome: _Outcome | None = None  # of the last step, if not counted yet

    def state(self) -> dict[str, Any]:
        self._settle()
        attributes = {
            "losses": list(self.losses),
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
        }
        return {"args": {}, "attributes": attributes}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        if not getattr(bare_optimizer(optimizer), "_step_supports_amp_scaling", False):
            raise ValueError(
                "SkipBadSteps needs an optimizer that can leave a step out by itself, as PyTorch's fused "
                f"ones do, got {type(bare_optimizer(optimizer)).__name__} without fused=True"
            )
        # The Trainer would restore another instance, and make it of the JSON in `args`. Without an
        # entry, as in an old checkpoint, it could not save.
        saved: Any = state.stateful_callbacks
        attributes = saved.setdefault(type(self).__name__, self.state())["attributes"]
        self.losses = deque(attributes["losses"], maxlen=WINDOW)
        self.skipped, self.in_a_row = attributes["skipped"], attributes["in_a_row"]

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        self._settle()
        mean, deviation = self._usual_loss()
        loss = _mean_over_processes(self._step_loss())
        norm = torch.as_tensor(self._grad_norm()).to(loss)
        good = loss.isfinite() & norm.isfinite() & (loss <= mean + self._spikes * deviation)
        bad = (~good).to(loss)
        # What a GradScaler tells it: the step is left out on the device, and the host does not wait to know.
        bare_optimizer(optimizer).found_inf = bad
        numbers = hardware.read_later(torch.stack((loss, norm, bad)))
        step, tells = state.global_step + 1, state.is_world_process_zero
        self._outcome = _Outcome(step, numbers, mean, deviation, tells)

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        del bare_optimizer(optimizer).found_inf

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if control.should_save or control.should_training_stop:
            self._settle()

    def _settle(self) -> None:
        """Count the last step, of which the device has decided."""
        outcome, self._outcome = self._outcome, None
        if outcome is None:
            return
        loss, norm, bad = outcome.numbers()
        if not bad:
            self.in_a_row = 0
            self.losses.append(loss)
            self._logged.append(loss)
            return
        if math.isfinite(loss) and math.isfinite(norm):
            usual = f"{outcome.mean:.3f} ± {outcome.deviation:.3f}"
            fault = f"the loss ({loss:.3f}) is far above the last ones ({usual})"
        else:
            fault = f"the loss ({loss:.3f}) or its gradients (norm {norm:.3g}) are not finite"
        self.skipped += 1
        self.in_a_row += 1
        if self._record is not None:
            row = {"skipped_because": fault, "skipped_loss": loss, "skipped_grad_norm": norm}
            self._record({"step": outcome.step, **row})
        if self.in_a_row >= self._limit:
            many = f"{self._limit} steps in a row were skipped: " if self._limit > 1 else ""
            raise RunError(
                f"{many}{fault} at step {outcome.step}; the last checkpoint is kept. Try a lower "
                "--learning-rate or a longer --warmup"
            )
        if outcome.tells:
            tqdm.write(f"step {outcome.step} is skipped: {fault}", file=sys.stderr)

    def _usual_loss(self) -> tuple[float, float]:
        """Mean and standard deviation of the last accepted losses; infinite where nothing is a spike."""
        if not self._spikes or len(self.losses) < LEAST:
            return math.inf, 0.0
        mean = math.fsum(self.losses) / len(self.losses)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in self.losses) / len(self.losses))
        return mean, deviation

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        assert logs is not None
        if "loss" not in logs:
            return
        self._settle()
        logs["skipped"] = self.skipped
        if self.skipped:  # the Trainer's own sum of losses may not be finite, for good
            count = len(self._logged)
            logs["loss"] = math.fsum(self._logged) / count if count else math.nan
        self._logged.clear()


def bare_optimizer(optimizer: Any) -> Any:
    """The optimizer within Accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)


def _mean_over_processes(value: Tensor) -> Tensor:
    value = value.detach().float()
    if dist.is_initialized() and dist.get_world_size() > 1:
        value = value / dist.get_world_size()  # a copy
        dist.all_reduce(value)
    return value
