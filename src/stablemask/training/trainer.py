"""The Transformers Trainer: our batches on every process, checkpoints whole or absent, any sharding."""

import errno
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import CheckpointException  # no Exception, but a BaseException
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState
from transformers.trainer_utils import EvalLoopOutput

from ..data.batches import TrainBatches, eval_loader, loader, merge_states
from ..errors import InputError
from ..reading import first_line, read_json
from . import checkpoints
from .processes import all_agree, control_group, gather, is_main
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
        batches: makes the batches of this process, from a step and the state that the data had then.
        collate: makes a batch of a list of examples.
        keep: how many of the latest checkpoints stay; the best one by ``eval_loss`` stays too.
        async_save: write checkpoints in the background.
        sequences: who shares sequences with this process; None where it has its own.

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
        batches: Callable[[int, dict], TrainBatches],
        collate: Callable | None,
        keep: int,
        async_save: bool = False,
        sequences: SequenceGroup | None = None,
        **kwargs: Any,
    ) -> None:
        self._use_cache = model.config.use_cache  # which a Trainer turns off, and would save so
        super().__init__(model=model, **kwargs)
        self.keep = keep
        self.data_seconds = 0.0
        self.step_loss = torch.zeros((), device=self.args.device)
        self.grad_norm = torch.zeros(())
        self._uncounted: torch.Tensor | int = 0  # real tokens of padded batches since the last log
        self._make_batches, self._collate = batches, collate
        self._sequences = sequences
        self._async_save = async_save
        self._in_shards = async_save or is_sharded(model)
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future | None = None
        self._first_step, self._data_state = 0, dict[str, Any]()
        assert self.args.output_dir is not None
        self._folder = Path(self.args.output_dir)

    # Data

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is not None:
            checkpoint = Path(resume_from_checkpoint)
            self._first_step = checkpoints.step_of(checkpoint)
            file = checkpoint / DATA_FILE
            with foreign(checkpoint):
                self._data_state = dict(read_json(file)) if file.exists() else {}
                TrainerState.load_from_json(str(checkpoint / STATE_FILE))
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._finish_saving()

    def get_train_dataloader(self) -> Any:
        self._batches = self._make_batches(self._first_step, self._data_state)
        if self._first_step >= self.args.max_steps:
            return ()
        workers, pin = self.args.dataloader_num_workers, self.args.dataloader_pin_memory
        return _Feed(self._take, loader(self._batches, workers=workers, pin_memory=pin))

    def _take(self, batches: Iterator[dict[str, Any]]) -> dict[str, Any]:
        begun = time.perf_counter()
        batch = next(batches)
        self.data_seconds += time.perf_counter() - begun
        self._batches.consumed(batch)
        return batch if self._sequences is None else self._sequences.share(batch)

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

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        # Like biases, a sink and a decay rate have no size to keep small.
        names = super().get_decay_parameter_names(model)
        return [name for name in names if not name.endswith((".sinks", ".log_gamma"))]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self.step_loss = torch.zeros((), device=self.args.device)
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any) -> torch.Tensor:
        if is_sharded(self.model):
            self.model.set_requires_gradient_sync(self.accelerator.sync_gradients)
        if "attention_mask" in inputs:
            self._uncounted = self._uncounted + inputs["attention_mask"].sum()
        else:  # every batch has the same size
            tokens = inputs["input_ids"].numel() * self.args.world_size
            self.state.num_input_tokens_seen += tokens
        loss = super().training_step(model, inputs, *args)
        self.step_loss += loss
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self._count_tokens()
        super().log(logs, *args, **kwargs)

    def _count_tokens(self) -> None:
        """Add the real tokens of padded batches, on all processes; this waits for the device."""
        tokens = torch.as_tensor(self._uncounted).cpu()
        if control_group() is not None:
            dist.all_reduce(tokens, group=control_group())
        self.state.num_input_tokens_seen += int(tokens)
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
        if not all_agree(not (self._folder / name).exists()):
            return
        partial = self._folder / checkpoints.INCOMPLETE
        if is_main():
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._written: Future | None = None
        try:
            super()._save_checkpoint(model, trial)
            data_state = merge_states(gather(self._batches.state_dict()))
            if is_main():
                (partial / name / DATA_FILE).write_text(json.dumps(data_state))
            self.accelerator.wait_for_everyone()
            if self._written is None:
                self._commit(name, self.state.best_global_step)
            else:
                self._writing = self._writer.submit(
                    self._commit_when_written, self._written, name, self.state.best_global_step
                )
        except (Exception, CheckpointException) as error:
            self._give_up(name, error)
        if self._writing is None:
            self.accelerator.wait_for_everyone()

    def _commit(self, name: str, best_step: int | None) -> None:
        if not is_main():
            return
        partial = self._folder / checkpoints.INCOMPLETE
        checkpoints.commit(partial / name, self._folder / name)
        shutil.rmtree(partial, ignore_errors=True)
        for old in checkpoints.list_checkpoints(self._folder)[: -self.keep]:
            if checkpoints.step_of(old) != best_step:
                checkpoints.remove(old)

    def _commit_when_written(self, written: Future, name: str, best_step: int | None) -> None:
        try:
            written.result()
            self._commit(name, best_step)
        except (Exception, CheckpointException) as error:
            self._give_up(name, error)

    def _give_up(self, name: str, error: BaseException) -> NoReturn:
        full = shutil.disk_usage(self._folder).free < 1 << 20
        if is_main():
            shutil.rmtree(self._folder / checkpoints.INCOMPLETE, ignore_errors=True)
        if full:  # which torch.save reports as a RuntimeError of its own
            reason = os.strerror(errno.ENOSPC)
            raise OSError(errno.ENOSPC, reason, str(self._folder / name)) from error
        raise error

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
            self._bare_model, self._bare_optimizer, _state_of(folder), wait=not self._async_save
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not _state_of(resume_from_checkpoint).is_dir():  # else they come with the optimizer
            with foreign(resume_from_checkpoint):
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        with foreign(checkpoint):
            if not _state_of(checkpoint).is_dir():
                super()._load_optimizer_and_scheduler(checkpoint)
            else:
                load_state(self._bare_model, self._bare_optimizer, _state_of(checkpoint))
                scheduler = torch.load(Path(checkpoint) / SCHEDULER_FILE, weights_only=True)
                self.lr_scheduler.load_state_dict(scheduler)
            # The part of the run before may have had fewer steps to come, and so a lower rate.
            shapes = zip(self.lr_scheduler.base_lrs, self.lr_scheduler.lr_lambdas)
            for group, (peak, shape) in zip(self._bare_optimizer.param_groups, shapes):
                group["lr"] = peak * shape(self.lr_scheduler.last_epoch)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with foreign(checkpoint):
            super()._load_rng_state(checkpoint)

    @property
    def _bare_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    @property
    def _bare_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)

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
        model: Any = self.model
        model.config.use_cache = self._use_cache
        super()._save(output_dir, state_dict)
        model.config.use_cache = self.args.use_cache

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
        # Read at the end, together. A batch of nothing but padding has no mean.
        mean = torch.where(count > 0, loss, 0.0).float()
        self._eval_batches.append(torch.stack((mean, count.to(mean))))
        return loss, None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._eval_batches: list[torch.Tensor] = []
        output = super().evaluation_loop(*args, **kwargs)
        sums = torch.zeros(2, dtype=torch.float64)
        if self._eval_batches:
            means, counts = torch.stack(self._eval_batches).cpu().double().unbind(-1)
            sums = torch.stack((means @ counts, counts.sum()))
        if control_group() is not None:
            dist.all_reduce(sums, group=control_group())
        nats, tokens = sums.tolist()
        assert output.metrics is not None
        output.metrics["eval_loss"] = nats / tokens
        return output


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


class _Feed:
    """An endless train loader, each of whose batches is taken by ``take``."""

    def __init__(self, take: Callable[[Iterator], Any], batches: DataLoader) -> None:
        self.take, self.batches = take, batches

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.batches)
        while True:
            yield self.take(batches)
