"""The Trainer that distils: the student learns from its teacher, and away from its first token.

    loss = KL(teacher || student) + first_token / 2 + excess

``first_token`` is the mean attention on the first token, over layers and the rows from the eighth on;
``excess`` sums up how far hidden states lie over a bound (see watch.py). The bound tightens. Where no biases
stand for the prefix (biases.py), the sink still carries its value at first, which fades. Both follow from the
number of the step alone. The means are over the tokens of a step, in however many batches and on however many
devices these are.
"""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...hf import keep_shifts, read_shifts, train_shifts
from ...hf.adapters import ADAPTER_CONFIG
from ...models.loss import chunked_causal_lm_loss
from ...models.settings import SHIFT_PARAMETER
from ...reading import read_json
from ..processes import total
from ..trainer import LanguageModelTrainer, foreign
from .calibration import Calibration
from .divergence import kl_of_hidden, kl_of_logits, linear_head
from .reading import Reading
from .watch import FIRST_ROW, Pass, Watch, softmax, with_fading_value

FIRST_TOKEN_WEIGHT = 0.5
EXCESS_WEIGHT = 1.0
SHIFT_RATE = 30  # times the learning rate of the weights
FADED = 0.4  # share of the steps after which the sink has no value
TIGHTENED = 0.6  # and after which the bound is tight
# In largest hidden values of an ordinary token of the layer. An absolute bound that is tight where massive
# activations are born would squeeze every token of the upper layers.
LOOSE, TIGHT, UNIT = 12.0, 3.0, 10.0


@dataclass(frozen=True)
class Schedule:
    """What the loss is made of at a step of a run that began with so many ``steps``."""

    steps: int

    def alpha(self, step: int) -> float:
        """How much of the prefix's value is left."""
        return max(0.0, 1 - step / (FADED * self.steps))

    def bound(self, step: int) -> float:
        """The bound, in ordinary largest values."""
        return LOOSE * (TIGHT / LOOSE) ** min(1.0, step / (TIGHTENED * self.steps))


@dataclass(frozen=True)
class Distillation:
    """What a run distils with.

    Attributes:
        teacher: frozen, on the device; None where it is the student without its adapter and shifts.
    """

    teacher: Any
    prefix: int | None
    calibration: Calibration
    schedule: Schedule


def frozen_copy(model: Any, dtype: torch.dtype) -> Any:
    """A teacher whose matrices are of ``dtype``, and whose hidden states are as precise as the model's.

    Autocast would cast the matrices each time; so they take half the memory, and no time.
    """
    kept = {
        id(p): nn.Parameter(
            p.detach().to(dtype if p.dim() > 1 else p.dtype, copy=True), requires_grad=False
        )
        for p in model.parameters()
    }
    teacher = copy.deepcopy(model, kept).eval()
    if dtype != (precise := model.dtype):
        embeddings = teacher.get_input_embeddings()
        embeddings.register_forward_hook(lambda module, inputs, output: output.to(precise))
    return teacher


class DistillingTrainer(LanguageModelTrainer):
    """A :class:`LanguageModelTrainer` of a student, whose shifts it trains and keeps in its configuration."""

    def __init__(self, *, model: Any, distillation: Distillation, **kwargs: Any) -> None:
        self.distillation = distillation
        train_shifts(model)
        self._bare = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._watch = Watch(self._bare)
        self._hidden: Tensor | None = None
        self._bare.get_decoder().register_forward_hook(self._keep_hidden)
        for module in model.modules():  # the student is compared without noise
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        super().__init__(model=model, **kwargs)
        self.model_accepts_loss_kwargs = False  # the Trainer is to divide by the batches of a step
        self._in_step: Tensor | None = None
        calibration, device = distillation.calibration, self.args.device
        if distillation.teacher is not None:
            distillation.teacher.to(device)
        self._values = {layer: value.to(device) for layer, value in calibration.values.items()}
        self._sums = {
            name: torch.zeros((), device=device) for name in ("kl", "first_token", "excess")
        }
        self._counted = 0
        ids = torch.zeros(1, 2, dtype=torch.long, device=device)
        with self._as_teacher(), self.accelerator.autocast():
            self._head = linear_head(self._bare, ids)
        takes = inspect.signature(self._bare.forward).parameters
        few = self._head is not None and "logits_to_keep" in takes
        # An index and no number: a slice would have a frozen head copied for each row of a batch.
        last = torch.zeros(1, dtype=torch.long, device=device)
        self._options: dict[str, Any] = {"use_cache": False}
        if few:
            self._options["logits_to_keep"] = last

    def _keep_hidden(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._hidden = output[0]

    # The loss

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        batches, _ = super().get_batch_samples(*args, **kwargs)
        counts = [_counts(batch["attention_mask"]) for batch in batches]
        self._in_step = total(sum(counts, torch.zeros(2, dtype=torch.float64)))
        return batches, None

    def _shares(self, real: Tensor) -> tuple[Tensor, Tensor]:
        """By what to multiply the means over a batch's tokens and rows, so that those of a step are over all of them."""
        if self._in_step is None:  # one batch, of no step
            return torch.ones(()), torch.ones(())
        batches = self.current_gradient_accumulation_steps * self.args.world_size
        shares = batches * _counts(real) / self._in_step.to(real.device).clamp(min=1)
        tokens, rows = shares.float()
        return tokens, rows

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        ids = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        with self.accelerator.autocast():
            goal = self._goal(ids)
            seen = self._begin_pass(real)
            ours = self._student(model, ids)
            seen.open = False
            kl = self._divergence(ours, goal, real)
        zero = torch.zeros((), device=ids.device)
        first_token = torch.stack([*seen.shares.values()]).mean() if seen.shares else zero
        excess = torch.stack([*seen.excesses.values()]).sum() if seen.excesses else zero
        seen.shares, seen.excesses = {}, {}
        of_tokens, of_rows = self._shares(real)
        kl, first_token = kl * of_tokens, first_token * of_rows
        for name, found in (("kl", kl), ("first_token", first_token), ("excess", excess)):
            self._sums[name] += found.detach()
        self._counted += 1
        return kl + FIRST_TOKEN_WEIGHT * first_token + EXCESS_WEIGHT * excess

    def _begin_pass(self, real: Tensor) -> Pass:
        schedule, step = self.distillation.schedule, self.state.global_step
        ordinary = self.distillation.calibration.ordinary.tolist()
        watched = range(len(ordinary) // 10, len(ordinary) - 1)
        bound = schedule.bound(step)
        seen = Pass(
            real,
            self._alpha(),
            self._values,
            {layer: (bound * ordinary[layer], UNIT * ordinary[layer]) for layer in watched},
        )
        self._watch.set(with_fading_value, seen)
        return seen

    def _alpha(self) -> float:
        step = self.state.global_step
        return self.distillation.schedule.alpha(step) if self._fading else 0.0

    @property
    def _fading(self) -> bool:
        """Whether no biases stand for the prefix's value."""
        return not self.distillation.calibration.keys

    def _student(self, model: Any, ids: Tensor) -> Tensor:
        """Hidden states, or logits where those are not the output layer's alone."""
        # The call is the wrapped model's, for the gradients of several devices meet there.
        logits = model(input_ids=ids, **self._options).logits
        return logits if self._head is None else self._take_hidden()

    def _goal(self, ids: Tensor) -> Tensor:
        """The same of the teacher, for the student's tokens."""
        reading = Reading.of(ids, self.distillation.prefix)
        with torch.no_grad(), self._as_teacher() as teacher:
            if self._head is None:
                return reading.rows(teacher(input_ids=reading.teacher, use_cache=False).logits)
            return reading.rows(
                teacher.get_decoder()(input_ids=reading.teacher, use_cache=False)[0]
            )

    @contextmanager
    def _as_teacher(self) -> Iterator[Any]:
        teacher = self.distillation.teacher
        if teacher is not None:
            yield teacher
            return
        without = self.model.disable_adapter() if self._bare is not self.model else nullcontext()
        with without, self._watch.over(softmax):
            yield self._bare

    def _divergence(self, ours: Tensor, goal: Tensor, real: Tensor) -> Tensor:
        if self._head is None:
            return kl_of_logits(ours, goal, real)
        teacher = self.distillation.teacher or self._bare
        dtype = torch.bfloat16 if self.args.bf16 else ours.dtype
        goal_weight = teacher.get_output_embeddings().weight
        return kl_of_hidden(ours.to(dtype), self._head.weight, goal, goal_weight, real)

    def _take_hidden(self) -> Tensor:
        hidden, self._hidden = self._hidden, None
        assert hidden is not None
        return hidden

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._counted:
            logs |= {name: (summed / self._counted).item() for name, summed in self._sums.items()}
            if self._fading:
                logs["alpha"] = self._alpha()
            for summed in self._sums.values():
                summed.zero_()
            self._counted = 0
        super().log(logs, *args, **kwargs)

    # Evaluation: before the first step of the teacher, so that a run is held against it

    def prediction_step(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        self._watch.set(None, None)
        if self.state.global_step:
            return super().prediction_step(model, inputs)
        inputs = self._prepare_inputs(inputs)
        ids, labels = inputs["input_ids"], inputs["labels"]
        with torch.no_grad(), self.accelerator.autocast():
            goal = self._goal(ids)
            if self._head is None:
                loss = nn.functional.cross_entropy(
                    goal[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
                )
            else:
                teacher = self.distillation.teacher or self._bare
                weight = teacher.get_output_embeddings().weight
                loss = chunked_causal_lm_loss(goal, weight, labels)
        return self._add_eval_loss(loss, labels[:, 1:])

    # The shifts

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        if self.optimizer is None:
            self._give_shifts_their_rate(super().create_optimizer(*args, **kwargs))
        return self.optimizer

    def _give_shifts_their_rate(self, optimizer: torch.optim.Optimizer) -> None:
        shifts = [p for name, p in self.model.named_parameters() if name.endswith(SHIFT_PARAMETER)]
        ours = {id(p) for p in shifts}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in ours]
        # One that is empty, as of an adapter, would take the settings of another from a checkpoint in shards.
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        rate = SHIFT_RATE * self.args.learning_rate
        optimizer.add_param_group({"params": shifts, "lr": rate, "weight_decay": 0.0})

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        config = self._text_config
        config.stablemask = {**config.stablemask, "shift": read_shifts(self._bare)}
        super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # The weights of a checkpoint are those of a model that trains no shifts.
        keep_shifts(self._bare)
        with foreign(resume_from_checkpoint):
            self._text_config.stablemask = _settings_of(Path(resume_from_checkpoint))
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            train_shifts(self._bare)

    @property
    def _text_config(self) -> Any:
        return self._bare.config.get_text_config(decoder=True)

    def finish(self) -> None:
        """Leave the model as it will be saved: the shifts in its configuration, nothing watched."""
        self._watch.set(None, None)
        keep_shifts(self._bare)


def _counts(real: Tensor) -> Tensor:
    """Of a mask of padding the tokens, and those whose attention on the first token counts, (2,), float64."""
    return torch.stack((real.sum(), real[:, FIRST_ROW:].sum())).double()


def _settings_of(checkpoint: Path) -> dict[str, Any]:
    adapter = checkpoint / ADAPTER_CONFIG
    content: Any = read_json(adapter if adapter.exists() else checkpoint / "config.json")
    content = content.get("text_config") or content
    return content["stablemask"]
