"""Steps that would harm the weights are left out."""

import math
import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ...errors import RunError

WINDOW = 128  # accepted steps that a loss is compared with
LEAST = 32  # of them, before any comparison


class SkipBadSteps(TrainerCallback, ExportableState):
    """Skips a step whose loss or gradients are not finite, and on request one whose loss is a spike.

    A skipped step leaves the weights, the optimizer's moments and the logged loss as they were. It counts
    as a step: its data is used up, and the learning rate moves on. Each is a line on stderr and a row of
    the record; their number goes into each log as ``skipped``. All processes decide alike, for the loss is
    averaged over them. What earlier losses were, and what was skipped, is saved with checkpoints.

    Args:
        step_loss: this process's loss of the step, as it went into the gradients.
        grad_norm: norm of the step's gradients before clipping, the same on every process.
        limit: how many steps in a row may be skipped; the last of them ends the run.
        spikes: skip a loss more than this many standard deviations above the mean of the last 128
            accepted ones, once there are 32; 0 for none.
        record: gets a row for each skipped step.

    Raises:
        RunError: ``limit`` steps in a row were skipped.
    """

    def __init__(
        self,
        step_loss: Callable[[], Tensor],
        grad_norm: Callable[[], Tensor],
        *,
        limit: int,
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

    def state(self) -> dict[str, Any]:
        attributes = {
            "losses": list(self.losses),
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
        }
        return {"args": {}, "attributes": attributes}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
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
        model: torch.nn.Module | None = None,
        **_: Any,
    ) -> None:
        assert model is not None
        loss = _mean_over_processes(self._step_loss())
        norm = torch.as_tensor(self._grad_norm()).to(loss)
        values = torch.stack((loss, norm)).tolist()  # waits for the device, once a step
        fault = self._fault(*values)
        if fault is None:
            self.in_a_row = 0
            self.losses.append(values[0])
            self._logged.append(values[0])
            return
        for parameter in model.parameters():
            parameter.grad = None  # and an optimizer passes over it
        self.skipped += 1
        self.in_a_row += 1
        step = state.global_step + 1
        if self._record is not None:
            numbers = {"skipped_loss": values[0], "skipped_grad_norm": values[1]}
            self._record({"step": step, "skipped_because": fault, **numbers})
        if self.in_a_row >= self._limit:
            many = f"{self._limit} steps in a row were skipped: " if self._limit > 1 else ""
            raise RunError(
                f"{many}{fault} at step {step}; the last checkpoint is kept. Try a lower "
                "--learning-rate or a longer --warmup"
            )
        if state.is_world_process_zero:
            tqdm.write(f"step {step} is skipped: {fault}", file=sys.stderr)

    def _fault(self, loss: float, norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"the loss ({loss:.3f}) or its gradients (norm {norm:.3g}) are not finite"
        if not self._spikes or len(self.losses) < LEAST:
            return None
        mean = math.fsum(self.losses) / len(self.losses)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in self.losses) / len(self.losses))
        if loss <= mean + self._spikes * deviation:
            return None
        return f"the loss ({loss:.3f}) is far above the last ones ({mean:.3f} ± {deviation:.3f})"

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
        logs["skipped"] = self.skipped
        if self.skipped:  # the Trainer's own sum of losses may not be finite, for good
            count = len(self._logged)
            logs["loss"] = math.fsum(self._logged) / count if count else math.nan
        self._logged.clear()


def _mean_over_processes(value: Tensor) -> Tensor:
    value = value.detach().float()
    if dist.is_initialized() and dist.get_world_size() > 1:
        value = value / dist.get_world_size()  # a copy
        dist.all_reduce(value)
    return value
