"""What all training runs share: the run folder, the Trainer, stopping, and the finished model.

The run folder, ``--out``::

    pretrain.yaml or finetune.yaml                    the resolved options
    run.json                                          versions, data, command, result
    model.safetensors, config.json, tokenizer files   the model, written last
    README.md           its model card                metrics.jsonl, tensorboard/
    checkpoints/        checkpoint-STEP, each whole
    texts/, calibration.safetensors                   of a model that is adapted (adapting/)
"""

import dataclasses
import functools
import json
import math
import platform
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
import transformers
from torch.utils.data import Subset
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, WandbCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging

from .. import __version__
from ..data.batches import TrainBatches
from ..errors import InputError
from ..evaluation.perplexity import perplexity_of
from ..models.devices import peak_flops
from ..options import load_yaml, option_fields, save_yaml
from ..reading import parse_json, read_json
from ..versions import tell_newer
from ..writing import only_writer
from . import checkpoints
from .callbacks import Probe, Record, SkipBadSteps, StopOnSignal, training_flops
from .machine import world_size
from .options import FREE_ON_RESUME, KEPT_ON_RESUME, TrainingOptions
from .processes import is_main, join_processes, on_main, rank
from .sequences import SequenceGroup
from .sharding import is_sharded
from .trainer import LanguageModelTrainer

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
Value = TypeVar("Value")
Options = TypeVar("Options", bound=TrainingOptions)


class TrainingData(Protocol):
    """Examples to train on and held out, both datasets with a length."""

    tokenizer: PreTrainedTokenizerBase
    train: Any
    validation: Any
    key: str  # another one wherever a token is


@dataclass(frozen=True)
class RunResult:
    """What a run came to. ``stopped_by`` is the signal that ended it early, or None."""

    folder: Path
    step: int
    eval_loss: float | None
    stopped_by: signal.Signals | None = None

    @property
    def perplexity(self) -> float | None:
        return None if self.eval_loss is None else perplexity_of(self.eval_loss)


def given(value: Value | None) -> Value:
    """An option that is filled in once the options are resolved."""
    assert value is not None
    return value


def options_file(options: TrainingOptions) -> str:
    return f"{options.command}.yaml"


def tokens_per_step(options: TrainingOptions) -> int:
    """Of all processes."""
    return given(options.global_batch_size) * given(options.context)


@dataclass(frozen=True)
class Start(Generic[Options]):
    """Where a run begins: its options resolved, its folder, and what an earlier part of it has left."""

    options: Options
    folder: Path
    checkpoint: Path | None
    finished: RunResult | None


def alone(run: Callable[[Options], RunResult]) -> Callable[[Options], RunResult]:
    """Of a function that trains: no other run may write to its folder meanwhile."""

    @functools.wraps(run)
    def guarded(options: Options) -> RunResult:
        join_processes(options)
        with ExitStack() as held:
            if options.out is not None:
                folder = Path(options.out)
                on_main(lambda: held.enter_context(only_writer(folder)))
            return run(options)

    return guarded


def start(options: Options) -> Start[Options]:
    """Resolve the options of a run and look into its folder.

    Raises:
        InputError: an option is out of its range, or the folder holds something else, was started with
            other options, or is damaged.
    """

    def look() -> Start[Options]:
        resolved = _as_begun(options).resolved()
        folder, checkpoint = _open_run(resolved)
        finished = None
        if options.resume:
            finished = _finished_run(folder, given(resolved.steps), checkpoint)
        tell_newer()
        return Start(resolved, folder, checkpoint, finished)

    return on_main(look)


def _as_begun(options: Options) -> Options:
    """A run that is resumed keeps what would follow from other options, where it is not given anew.

    So it has the same global batch on any number of devices, and the same warm-up for more steps.
    """
    if not options.resume or options.out is None:
        return options
    written = Path(options.out) / options_file(options)
    if not written.exists():
        return options
    before = load_yaml(written)
    left_out = [name for name in KEPT_ON_RESUME if getattr(options, name, before) is None]
    kept: dict[str, Any] = {name: before.get(name) for name in left_out}
    return dataclasses.replace(options, **kept)


def _open_run(options: TrainingOptions) -> tuple[Path, Path | None]:
    folder = Path(given(options.out))
    written = folder / options_file(options)
    if not options.resume:
        if written.exists():
            raise InputError(f"{folder} already holds a run; add --resume, or name another --out")
        # A hidden file is what a kill left of one that was never renamed.
        if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no run; name another --out")
        return folder, None
    if not written.exists():
        raise InputError(f"{folder} holds no run to resume; leave out --resume to start one")
    before, now = load_yaml(written), dataclasses.asdict(options)
    for field in option_fields(type(options)):
        name = field.name
        started = before.get(name, field.default)
        if name not in FREE_ON_RESUME and started != now[name]:
            raise InputError(
                f"{folder} was started with {name} {started!r}, not {now[name]!r}; "
                "resume with the same settings, or name another --out"
            )
    return folder, checkpoints.last_whole(folder / "checkpoints")


def _finished_run(folder: Path, steps: int, checkpoint: Path | None) -> RunResult | None:
    """The result of a run that has nothing left to do.

    Raises:
        InputError: it has taken more steps, or its checkpoints are gone and it has to take more.
    """
    try:
        result = parse_json((folder / RUN_FILE).read_bytes())["result"]
        finished = RunResult(folder, result["step"], result["eval_loss"])
    except (OSError, ValueError, LookupError, TypeError):
        finished = RunResult(folder, 0, None)
    done = 0 if checkpoint is None else checkpoints.step_of(checkpoint)
    if steps < max(done, finished.step):
        raise InputError(
            f"{folder} has taken {max(done, finished.step)} steps already, and --steps asks for {steps}"
        )
    if steps > finished.step > done:
        raise InputError(
            f"{folder} has finished its {finished.step} steps and holds no checkpoint of them to go on "
            "from; its model can be trained on with `stablemask finetune`"
        )
    return finished if finished.step == steps else None


def claim(folder: Path, options: TrainingOptions) -> None:
    """Make the folder that of a run, before what it trains on is ready; ``resume`` then finds it."""
    if not (folder / options_file(options)).exists():
        save_yaml(dataclasses.replace(options, resume=False), folder / options_file(options))


def begin_run(folder: Path, options: TrainingOptions, key: str, record: dict[str, Any]) -> None:
    """Write what makes the folder a run, or check that a run goes on with the text it began with."""
    on_main(lambda: _begin_run(folder, options, key, record))


def _begin_run(folder: Path, options: TrainingOptions, key: str, record: dict[str, Any]) -> None:
    if (folder / RUN_FILE).exists():
        before = read_json(folder / RUN_FILE)
        if not isinstance(before, dict) or before.get("corpus") != key:
            raise InputError(
                f"{options.data} is not what {folder} was started with: its text or its "
                "tokenizer has changed; restore it, or name another --out"
            )
        if load_yaml(folder / options_file(options)).get("steps") != options.steps:
            lasting = dataclasses.replace(options, resume=False)
            save_yaml(lasting, folder / options_file(options))
            _write_json(folder / RUN_FILE, before | {"command": record["command"]})
        return
    save_yaml(options, folder / options_file(options))  # from here on --resume finds the run
    versions = {
        "stablemask": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    _write_json(folder / RUN_FILE, {"corpus": key, **record, "versions": versions})


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
    trainer = make(
        model=model,
        args=TrainingArguments(**(_arguments(options, folder) | own | arguments)),
        batches=lambda step, state: TrainBatches(
            data.train,
            seed=options.seed,
            batch_size=options.batch_size,
            accumulation=given(options.gradient_accumulation),
            rank=rank() // together,
            ranks=world_size() // together,
            step=step,
            collate=collate,
            state=state,
        ),
        collate=collate,
        eval_dataset=_first_tokens(data.validation, options.eval_tokens, options),
        processing_class=data.tokenizer,
        keep=options.keep_checkpoints,
        async_save=options.async_save,
        sequences=sequences,
    )
    trainer.remove_callback(PrinterCallback)
    for callback in _callbacks(options, folder, trainer, data, callbacks):
        trainer.add_callback(callback)
    if options.tensorboard and is_main():
        from torch.utils.tensorboard import SummaryWriter

        begin = checkpoints.step_of(checkpoint) + 1 if checkpoint else None
        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=begin)
        trainer.add_callback(TensorBoardCallback(writer))
    if options.wandb:
        trainer.add_callback(WandbCallback())
    return trainer


def _callbacks(
    options: TrainingOptions,
    folder: Path,
    trainer: LanguageModelTrainer,
    data: TrainingData,
    more: tuple[TrainerCallback, ...],
) -> Iterator[TrainerCallback]:
    """In an order in which each finds in a log what those before it have added."""
    context = given(options.context)
    device = trainer.args.device
    record = Record(
        folder / METRICS_FILE,
        flops_per_token=training_flops(trainer.model, context),
        peak_flops=options.peak_flops or peak_flops(device, getattr(torch, options.dtype)),
        data_seconds=lambda: trainer.data_seconds,
    )
    yield SkipBadSteps(
        lambda: trainer.step_loss,
        lambda: trainer.grad_norm,
        limit=options.skip_limit,
        spikes=options.skip_spikes,
        record=record.add,
    )
    if options.probe_tokens:
        yield Probe(data.validation[0]["input_ids"][: options.probe_tokens])
    yield from more
    yield record


def _arguments(options: TrainingOptions, folder: Path) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    return {
        "output_dir": str(folder / "checkpoints"),
        "max_steps": given(options.steps),
        "per_device_train_batch_size": options.batch_size,
        "per_device_eval_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": options.min_learning_rate},
        "warmup_steps": given(options.warmup),
        "weight_decay": options.weight_decay,
        "adam_beta1": options.beta1,
        "adam_beta2": options.beta2,
        "max_grad_norm": options.clip,
        "use_cpu": not on_gpu,
        "bf16": options.dtype == "bfloat16",
        "torch_compile": options.compile,
        "logging_steps": options.log_every,
        "logging_nan_inf_filter": False,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
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


def _first_tokens(validation: Any, tokens: int | None, options: TrainingOptions) -> Any:
    if tokens is None:
        return validation
    blocks = min(len(validation), math.ceil(tokens / given(options.context)))
    return Subset(validation, range(blocks))


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
    validation = _first_tokens(data.validation, options.final_eval_tokens, options)
    metrics = trainer.evaluate(eval_dataset=validation)
    result = RunResult(folder, trainer.state.global_step, metrics["eval_loss"])
    partial = folder / "checkpoints" / checkpoints.INCOMPLETE
    on_main(lambda: shutil.rmtree(partial, ignore_errors=True))
    save(str(partial))
    on_main(lambda: _put_in_place(partial, result, write_card, more or {}))
    return result


def _put_in_place(
    partial: Path,
    result: RunResult,
    write_card: Callable[[dict[str, Any]], None],
    more: dict[str, Any],
) -> None:
    folder = result.folder
    for path in partial.iterdir():
        if path.name != "training_args.bin":  # a pickle, which nothing of ours reads
            path.replace(folder / path.name)
    shutil.rmtree(partial)
    record = read_json(folder / RUN_FILE) | more
    record["result"] = {"step": result.step, "eval_loss": result.eval_loss}
    write_card(record)
    _write_json(folder / RUN_FILE, record)


def command_line(options: TrainingOptions) -> str:
    """The command that gives these options, defaults left out."""
    words = ["stablemask", options.command]
    for field in option_fields(type(options)):
        value = getattr(options, field.name)
        if value == field.default or field.name in ("resume", "dry_run"):
            continue
        if isinstance(value, bool):
            words.append(field.flag if value else field.flag.replace("--", "--no-", 1))
        elif isinstance(value, list):
            words += [field.flag, *map(str, value)]
        else:
            words += [field.flag, str(value)]
    return shlex.join(words)


def _write_json(path: Path, content: dict) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)
