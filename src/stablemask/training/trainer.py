"""The Transformers Trainer: our batches on every process, checkpoints whole or absent, any sharding."""

import errno
import functools
import math
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException  # no Exception, but a BaseException
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState
from transformers.trainer_utils import EvalLoopOutput

from .. import strict_json
from ..data.batches import TrainBatches, eval_loader, loader, merge_states
from ..errors import InputError
from ..reading import first_line, read_json
from . import checkpoints
from .callbacks.guards import bare_optimizer
from .processes import gather, is_main, on_main, rank, total
from .sequences import SequenceGroup
from .sharding import is_sharded
from .state import load_state, save_state, whole_weights

STATE_FOLDER = "state"
DATA_FILE = "data.json"
SCHEDULER_FILE = "scheduler.pt"
STATE_FILE = "trainer_state.json"


class LanguageModelTrainer(Trainer):
    """A Trainer for language models, on one process or many.

    Checkpoints are renamed into place. A sharded model, and any that is saved in the background, has its
    weights and optimizer in a distributed checkpoint (``state/``), others in the Trainer's own files.
    ``eval_loss`` is the mean over tokens, whatever the lengths in a batch.

    Args:
        batches: what this process trains on.
        collate: makes a batch of a list of examples.
        keep: how many of the latest checkpoints stay; the best one by ``eval_loss`` stays too.
        async_save: write checkpoints in the background.
        sequences: who shares sequences with this process; None where it has its own.
        rate: the learning rate at a step of so many ``steps``, as a share of its peak; None for that of the
            arguments.

    Attributes:
        data_seconds: how long it has waited for batches.
        step_loss: this process's loss of the current step, as it went into the gradients.
        grad_norm: norm of the step's gradients before clipping.
    """

    model: Any
    lr_scheduler: Any

    def __init__(
        self,
        *,
        model: Any,
        batches: TrainBatches,
        collate: Callable | None,
        keep: int,
        async_save: bool = False,
        sequences: SequenceGroup | None = None,
        rate: Callable[..., float] | None = None,
        **kwargs: Any,
    ) -> None:
        self._rate = rate
        # Which a Trainer turns off, and would save so; of a model of several parts each has its own.
        self._use_cache = getattr(model.config, "use_cache", None)
        super().__init__(model=model, **kwargs)
        self.keep = keep
        self.data_seconds = 0.0
        self.step_loss = self.grad_norm = torch.zeros(())
        self._loss_so_far: torch.Tensor | float = 0.0  # of the step's batches before the last
        self._uncounted: torch.Tensor | int = 0  # tokens since the last log
        self._batches, self._collate, self._sequences = batches, collate, sequences
        self._eval_sums = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self._async_save = async_save
        self._in_shards = async_save or is_sharded(model)
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future | None = None
        assert self.args.output_dir is not None
        self._folder = Path(self.args.output_dir)

    # Data

    def train(self, *args: Any, **kwargs: Any) -> Any:
        # The Trainer has the same seed everywhere; dropout is to be another on each device.
        torch.manual_seed(self.args.seed + rank())
        try:
            return super().train(*args, **kwargs)
        finally:
            self._finish_saving()

    def get_train_dataloader(self) -> Any:
        if self._batches.step >= self.args.max_steps:
            return ()
        workers, pin = self.args.dataloader_num_workers, self.args.dataloader_pin_memory
        return self._taken(loader(self._batches, workers=workers, pin_memory=pin))

    def _taken(self, batches: DataLoader) -> Iterator[dict[str, Any]]:
        waiting = iter(batches)
        while True:
            begun = time.perf_counter()
            batch = next(waiting)
            self.data_seconds += time.perf_counter() - begun
            self._batches.consumed(batch)
            yield batch if self._sequences is None else self._sequences.share(batch)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        assert self.args.eval_batch_size is not None
        return eval_loader(
            self.eval_dataset if eval_dataset is None else eval_dataset,
            self.args.eval_batch_size,
            rank=self._batches.rank,
            ranks=self._batches.ranks,
            collate=self._collate,
        )

    # Steps

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self._rate is None:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = optimizer or self.optimizer
        assert optimizer is not None
        shape = functools.partial(self._rate, steps=num_training_steps)
        self.lr_scheduler = LambdaLR(optimizer, shape)
        return self.lr_scheduler

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        # Like biases, sinks and decay rates have no size to keep small.
        names = super().get_decay_parameter_names(model)
        own = (".sinks", ".sink_keys", ".log_gamma", ".front_token")
        return [name for name in names if not name.endswith(own)]

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        last = self.accelerator.sync_gradients
        if is_sharded(self.model):
            self.model.set_requires_gradient_sync(last)
        mask = inputs.get("attention_mask")
        tokens = inputs["input_ids"].numel() if mask is None else mask.sum()
        self._uncounted = self._uncounted + tokens
        loss = super().training_step(model, inputs, *args)
        self.step_loss = self._loss_so_far + loss
        self._loss_so_far = 0.0 if last else self.step_loss
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self._count_tokens()
        super().log(logs, *args, **kwargs)

    def _count_tokens(self) -> None:
        """Add the tokens of all processes, without padding; this waits for the device."""
        self.state.num_input_tokens_seen += int(total(torch.as_tensor(self._uncounted).cpu()))
        self._uncounted = 0

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self.grad_norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return self.grad_norm

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._folder / checkpoints.INCOMPLETE)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._finish_saving()
        self._count_tokens()
        name = f"checkpoint-{self.state.global_step}"
        partial = self._folder / checkpoints.INCOMPLETE

        def begin() -> bool:
            shutil.rmtree(partial, ignore_errors=True)
            return not (self._folder / name).exists()

        if not on_main(begin):
            return
        self._written: Future | None = None
        with self._whole_or_absent(name):
            super()._save_checkpoint(model, trial)
            data_state = merge_states(gather(self._batches.state_dict()))  # all have written now
            if is_main():
                (partial / name / DATA_FILE).write_text(strict_json.dumps(data_state))
                state = read_json(partial / name / STATE_FILE)  # in which Transformers writes NaN
                (partial / name / STATE_FILE).write_text(strict_json.dumps(state, indent=2) + "\n")
        losses = {
            row["step"]: loss
            for row in self.state.log_history
            if (loss := row.get("eval_loss")) is not None and math.isfinite(loss)
        }
        rest = name, losses, self._written
        if self._written is None:
            self._commit(*rest)
        else:
            self._writing = self._writer.submit(self._commit, *rest)

    def _commit(self, name: str, losses: dict[float, float], written: Future | None) -> None:
        with self._whole_or_absent(name):
            if written is not None:
                written.result()
            if not is_main():
                return
            partial = self._folder / checkpoints.INCOMPLETE
            checkpoints.commit(partial / name, self._folder / name)
            shutil.rmtree(partial, ignore_errors=True)
            steps = {
                one: checkpoints.step_of(one) for one in checkpoints.list_checkpoints(self._folder)
            }
            evaluated = [one for one in steps if steps[one] in losses]
            best = min(evaluated, key=lambda one: losses[steps[one]], default=None)
            for old in list(steps)[: -self.keep]:
                if old != best:
                    checkpoints.remove(old)

    @contextmanager
    def _whole_or_absent(self, name: str) -> Iterator[None]:
        try:
            yield
        except (Exception, CheckpointException) as error:
            full = shutil.disk_usage(self._folder).free < 1 << 20
            if is_main():
                shutil.rmtree(self._folder / checkpoints.INCOMPLETE, ignore_errors=True)
            if full:  # which torch.save reports as a RuntimeError of its own
                reason = os.strerror(errno.ENOSPC)
                raise OSError(errno.ENOSPC, reason, str(self._folder / name)) from error
            raise

    def _finish_saving(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self._writing is not None and self._writing.done():
            self._finish_saving()  # so that a full disk shows now and not at the next checkpoint
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._in_shards:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder = Path(output_dir)
        if is_main():
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER_FILE)
        self._written = save_state(
            self._bare_model,
            bare_optimizer(self.optimizer),
            _state_of(folder),
            wait=not self._async_save,
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not _state_of(resume_from_checkpoint).is_dir():  # else they come with the optimizer
            with foreign(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        optimizer = bare_optimizer(self.optimizer)
        with foreign(checkpoint):
            if not _state_of(checkpoint).is_dir():
                super()._load_optimizer_and_scheduler(checkpoint)
            else:
                load_state(self._bare_model, optimizer, _state_of(checkpoint))
                scheduler = torch.load(Path(checkpoint) / SCHEDULER_FILE, weights_only=True)
                self.lr_scheduler.load_state_dict(scheduler)
            # The part of the run before may have had fewer steps to come, and so a lower rate.
            shapes = zip(self.lr_scheduler.base_lrs, self.lr_scheduler.lr_lambdas)
            for group, (peak, shape) in zip(optimizer.param_groups, shapes):
                group["lr"] = peak * shape(self.lr_scheduler.last_epoch)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with foreign(checkpoint):
            super()._load_rng_state(checkpoint)

    @property
    def _bare_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    # The model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call and self._in_shards:  # of a checkpoint, whose weights are in its state
            if is_main():
                self._bare_model.config.save_pretrained(output_dir)
        elif is_sharded(self.model):
            weights = whole_weights(self.model)
            if is_main():
                self._save(output_dir, weights)
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        config: Any = self.model.config
        if self._use_cache is None:
            del config.use_cache
        else:
            config.use_cache = self._use_cache
        super()._save(output_dir, state_dict)
        config.use_cache = self.args.use_cache

    # Evaluation

    def prediction_step(self, model: Any, inputs: dict[str, Any], *_: Any, **__: Any) -> Any:
        # The Trainer's own divides by the tokens of all processes, which may have unequal numbers.
        inputs = self._prepare_inputs(inputs)
        if self._sequences is not None:
            inputs = self._sequences.share(inputs)
        targets = inputs["shift_labels"] if "shift_labels" in inputs else inputs["labels"][:, 1:]
        with torch.no_grad():
            loss = model(**inputs).loss
        return self._add_eval_loss(loss, targets)

    def _add_eval_loss(self, loss: torch.Tensor, targets: torch.Tensor) -> Any:
        """Count the mean loss of a batch; what a prediction step returns."""
        count = (targets != -100).sum()
        # Read at the end. A batch of nothing but padding has no mean.
        nats = torch.where(count > 0, loss, 0.0).double() * count
        self._eval_sums += torch.stack((nats, count.double()))
        return loss, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._eval_sums.zero_()
        output = super().evaluation_loop(*args, **kwargs)
        nats, tokens = total(self._eval_sums.cpu()).tolist()
        assert output.metrics is not None
        output.metrics["eval_loss"] = nats / tokens
        return output


def begun_at(checkpoint: Path | None) -> tuple[int, dict[str, Any]]:
    """The step that a run goes on from, and the state that its data had then."""
    if checkpoint is None:
        return 0, {}
    with foreign(checkpoint):
        TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        return checkpoints.step_of(checkpoint), dict(read_json(checkpoint / DATA_FILE))


def _state_of(checkpoint: str | Path) -> Path:
    return Path(checkpoint) / STATE_FOLDER


@contextmanager
def foreign(checkpoint: str | Path | None) -> Iterator[None]:
    """One line for a checkpoint that holds what it should not: its files may be anybody's."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (
        CheckpointException, pickle.UnpicklingError, RuntimeError, ValueError, LookupError, TypeError,
        AttributeError, EOFError,
    ) as error:  # fmt: skip
        cause: BaseException = error
        if isinstance(error, CheckpointException):
            cause = next(iter(error.failures.values()))[0]
            if isinstance(cause, OSError | MemoryError):
                raise cause from error
        # PyTorch's own words for it advise to load the file as code.
        is_code = isinstance(cause, pickle.UnpicklingError)
        reason = "it holds a pickle of more than data" if is_code else first_line(cause)
        refusal: Any = InputError(
            f"{checkpoint} is no checkpoint of this run ({reason}); remove it to go on from the one before"
        )
        refusal.told_by_main = not is_main()
        raise refusal from error
