"""The Trainer of a run: put together from its options, run until its end or a signal, its model saved."""

import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.utils.data import Subset
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging

from ..data.batches import TrainBatches
from ..models.devices import peak_flops
from . import checkpoints
from .callbacks import Probe, Record, SkipBadSteps, StopOnSignal, training_flops
from .machine import world_size
from .options import TrainingOptions
from .processes import is_main, on_main, rank
from .run import RunResult, given, put_in_place
from .schedule import rate_at
from .sequences import SequenceGroup
from .sharding import is_sharded
from .trainer import LanguageModelTrainer, begun_at

METRICS_FILE = "metrics.jsonl"


class TrainingData(Protocol):
    """Examples to train on and held out, both datasets with a length."""

    tokenizer: PreTrainedTokenizerBase
    train: Any
    validation: Any
    key: str  # another one wherever a token is


def build_trainer(
    options: TrainingOptions,
    folder: Path,
    model: torch.nn.Module,
    data: TrainingData,
    checkpoint: Path | None,
    *,
    callbacks: tuple[TrainerCallback, ...] = (),
    collate: Callable | None = None,
    sequences: SequenceGroup | None = None,
    make: Callable[..., LanguageModelTrainer] = LanguageModelTrainer,
    **arguments: Any,
) -> LanguageModelTrainer:
    """The Trainer of a run.

    Args:
        make: makes it, from what :class:`LanguageModelTrainer` takes.
        callbacks: they come before the record of a log, and may add to it.
        collate: makes a batch of a list of examples; by default they are stacked.
        sequences: who shares sequences with this process.
        arguments: of the TrainingArguments, in place of ours.
    """
    if options.gradient_checkpointing:
        # Transformers has renamed it; older versions know only the second name.
        enable: Any = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})  # type: ignore[operator]
    # A sharded model is compiled by the layer, and casts by itself.
    own = {"torch_compile": False, "bf16": False} if is_sharded(model) else {}
    together = 1 if sequences is None else sequences.size
    step, state = begun_at(checkpoint)
    trainer = make(
        model=model,
        args=TrainingArguments(**(_arguments(options, folder) | own | arguments)),
        batches=TrainBatches(
            data.train,
            seed=options.seed,
            batch_size=options.batch_size,
            accumulation=options.accumulation,
            rank=rank() // together,
            ranks=world_size() // together,
            step=step,
            collate=collate,
            state=state,
        ),
        collate=collate,
        eval_dataset=_first_tokens(data.validation, options.eval_tokens),
        processing_class=data.tokenizer,
        keep=options.keep_checkpoints,
        async_save=options.async_save,
        sequences=sequences,
        rate=partial(
            rate_at,
            warmup=given(options.warmup),
            shape=options.schedule,
            start=options.start_learning_rate,
            end=options.min_learning_rate,
        ),
    )
    trainer.remove_callback(PrinterCallback)
    record = Record(
        folder / METRICS_FILE,
        flops_per_token=training_flops(trainer.model, given(options.context)),
        peak_flops=options.peak_flops
        or peak_flops(trainer.args.device, getattr(torch, options.dtype)),
        data_seconds=lambda: trainer.data_seconds,
    )
    # In an order in which each finds in a log what those before it have added.
    trainer.add_callback(
        SkipBadSteps(
            lambda: trainer.step_loss,
            lambda: trainer.grad_norm,
            spikes=options.skip_spikes,
            record=record.add,
        )
    )
    if options.probe_tokens:
        trainer.add_callback(Probe(data.validation[0]["input_ids"][: options.probe_tokens]))
    for callback in (*callbacks, record):
        trainer.add_callback(callback)
    if options.tensorboard and is_main():
        from torch.utils.tensorboard import SummaryWriter

        begin = checkpoints.step_of(checkpoint) + 1 if checkpoint else None
        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=begin)
        trainer.add_callback(TensorBoardCallback(writer))
    if options.wandb:
        trainer.add_callback(WandbCallback())
    return trainer


def _arguments(options: TrainingOptions, folder: Path) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(folder / "checkpoints"),
        "max_steps": given(options.steps),
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulation,
        "learning_rate": options.learning_rate,
        "weight_decay": options.weight_decay,
        "adam_beta2": options.beta2,
        "max_grad_norm": options.clip,
        "use_cpu": not on_gpu,
        "bf16": options.dtype == "bfloat16",
        "torch_compile": options.compile,
        "logging_steps": options.log_every,
        "logging_nan_inf_filter": False,
        "ignore_data_skip": True,  # our batches begin where they should
        "dataloader_num_workers": options.workers or 0,
        "ddp_find_unused_parameters": False,
        "eval_strategy": "steps",
        "eval_steps": options.eval_every,
        "save_strategy": "steps",
        "save_steps": given(options.save_every),
        "seed": options.seed,
        "data_seed": options.seed,
        "dataloader_pin_memory": on_gpu,
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "label_names": ["labels"],
        "disable_tqdm": True,
        "report_to": [],
        "run_name": folder.name,
    }


def train(trainer: LanguageModelTrainer, checkpoint: Path | None) -> signal.Signals | None:
    """Run the training; the signal that stopped it before its last step, or None."""
    transformers_logging.disable_progress_bar()  # one for each file saved, beside ours
    with StopOnSignal() as stop:
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return stop.received if trainer.state.global_step < trainer.args.max_steps else None


def _first_tokens(validation: Any, tokens: int | None) -> Any:
    """The first examples, as many as hold so many tokens."""
    if tokens is None:
        return validation
    count = taken = 0
    while taken < tokens and count < len(validation):
        taken += len(validation[count]["input_ids"])
        count += 1
    return Subset(validation, range(count))


def finish_run(
    folder: Path,
    options: TrainingOptions,
    trainer: LanguageModelTrainer,
    data: TrainingData,
    save: Callable[[str], object],
    write_card: Callable[[dict[str, Any]], None],
    more: dict[str, Any] | None = None,
) -> RunResult:
    """Evaluate on the validation split and write the model.

    Args:
        save: writes the model into a folder.
        write_card: writes the model card from the run's record.
        more: what else the record is to hold.
    """
    trainer.remove_callback(TensorBoardCallback)  # its writer has closed with the training
    validation = _first_tokens(data.validation, options.final_eval_tokens)
    metrics = trainer.evaluate(eval_dataset=validation)
    result = RunResult(folder, trainer.state.global_step, metrics["eval_loss"])
    partial = folder / "checkpoints" / checkpoints.INCOMPLETE
    on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
    save(str(partial))
    on_main(lambda: put_in_place(partial, result, write_card, more or {}))
    return result
