"""Pretraining: from options to a folder with a model, through the Transformers Trainer.

The run folder, ``--out``::

    pretrain.yaml       the resolved options          run.json   versions, corpus, command
    model.safetensors, config.json, tokenizer files   the model, written last
    README.md           its model card                metrics.jsonl, tensorboard/
    checkpoints/        checkpoint-STEP, each whole
"""

import dataclasses
import json
import math
import platform
import shlex
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch.utils.data import Subset
from transformers import TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging

from .. import __version__
from ..data import Corpus, prepare_corpus
from ..errors import InputError
from ..models.cost import count_parameters, flops_per_token, training_memory
from ..models.modeling import StableMaskForCausalLM
from ..options import load_yaml, option_fields, save_yaml
from . import checkpoints
from .callbacks import Record, StopOnSignal, StopWhenNotFinite
from .card import write_model_card
from .options import FREE_ON_RESUME, PretrainOptions
from .trainer import LanguageModelTrainer

OPTIONS_FILE = "pretrain.yaml"
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
Value = TypeVar("Value")


@dataclass(frozen=True)
class PretrainResult:
    """What a run came to. ``stopped_by`` is the signal that ended it early, or None."""

    folder: Path
    step: int
    eval_loss: float | None
    stopped_by: signal.Signals | None = None

    @property
    def perplexity(self) -> float | None:
        return None if self.eval_loss is None else math.exp(self.eval_loss)


def pretrain(options: PretrainOptions) -> PretrainResult:
    """Train a model from scratch, or go on with a run that was interrupted.

    Raises:
        InputError: an option, the data or the run folder is not usable; nothing was written.
        RunError: the loss or its gradients are no longer finite; the last checkpoint is kept.
    """
    command = command_line(options)
    options = options.resolved()
    folder = Path(_given(options.out))
    checkpoint = _open_run(folder, options)
    finished = _finished(folder) if options.resume else None
    if finished is not None:
        return finished

    corpus = prepare_corpus(
        options.data,
        block_size=_given(options.context),
        vocab_size=_given(options.vocab_size),
        tokenizer=options.tokenizer,
        text_column=options.text_column,
    )
    _begin_run(folder, options, corpus, command)
    transformers_logging.disable_progress_bar()  # one for each file saved, beside ours
    set_seed(options.seed)
    model = StableMaskForCausalLM(_config_for(options, corpus))
    trainer = _build_trainer(options, folder, model, corpus, checkpoint)
    with StopOnSignal() as stop:
        trainer.add_callback(stop)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    step = trainer.state.global_step
    if stop.received is not None and step < _given(options.steps):
        return PretrainResult(folder, step, None, stop.received)
    return _finish_run(folder, options, trainer, corpus)


def describe_cost(options: PretrainOptions) -> str:
    """What a run would take, worked out without data and without allocating the model."""
    options = options.resolved()
    config = options.model_config()
    dtype = getattr(torch, options.dtype)
    flops = flops_per_token(config, _given(options.context))
    memory = training_memory(
        config, options.batch_size, _given(options.context), dtype, options.gradient_checkpointing
    )
    lines = [
        f"preset            {options.preset}, {options.attention} attention, {options.position} positions",
        f"parameters        {count_parameters(config):,}",
        f"FLOPs per token   {flops.training:.3e} to train, {flops.forward:.3e} forward",
        f"memory, estimate  {memory['total'] / 2**30:.2f} GiB a device at batch size "
        f"{options.batch_size} in {options.dtype}",
    ]
    parts = [
        f"  {name:<15} {size / 2**30:.2f} GiB" for name, size in memory.items() if name != "total"
    ]
    if options.steps is not None:
        tokens = options.steps * _tokens_per_step(options)
        parts += [
            f"tokens            {tokens:,} ({options.steps:,} steps of {_tokens_per_step(options):,})",
            f"FLOPs             {flops.training * tokens:.3e} in all",
        ]
    return "\n".join(lines + parts)


def _given(value: Value | None) -> Value:
    """An option that is filled in once the options are resolved."""
    assert value is not None
    return value


def _tokens_per_step(options: PretrainOptions) -> int:
    return options.batch_size * options.gradient_accumulation * _given(options.context)


def _open_run(folder: Path, options: PretrainOptions) -> Path | None:
    """Check the run folder against the options; the checkpoint to resume from, if there is one."""
    written = folder / OPTIONS_FILE
    if folder.exists() and not folder.is_dir():
        raise InputError(f"out must be a folder, {folder} is a file")
    if not options.resume:
        if written.exists():
            raise InputError(f"{folder} already holds a run; add --resume, or name another --out")
        # A hidden file is what a kill left of one that was never renamed.
        if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise InputError(f"{folder} is not empty and holds no run; name another --out")
        return None
    if not written.exists():
        raise InputError(f"{folder} holds no run to resume; leave out --resume to start one")
    before, now = load_yaml(written), dataclasses.asdict(options)
    for field in option_fields(PretrainOptions):
        name = field.name
        if name not in FREE_ON_RESUME and before.get(name) != now[name]:
            raise InputError(
                f"{folder} was started with {name} {before.get(name)!r}, not {now[name]!r}; "
                "resume with the same settings, or name another --out"
            )
    found = checkpoints.list_checkpoints(folder / "checkpoints")
    if not found:
        return None
    checkpoints.verify(found[-1])
    return found[-1]


def _finished(folder: Path) -> PretrainResult | None:
    """The result of a run that has nothing left to do."""
    try:
        result = json.loads((folder / RUN_FILE).read_text())["result"]
    except (OSError, ValueError, KeyError):
        return None
    return PretrainResult(folder, result["step"], result["eval_loss"])


def _begin_run(folder: Path, options: PretrainOptions, corpus: Corpus, command: str) -> None:
    """Write what makes the folder a run, or check that a run goes on with the text it began with."""
    if (folder / RUN_FILE).exists():
        key = json.loads((folder / RUN_FILE).read_text())["corpus"]
        if key != corpus.key:
            raise InputError(
                f"{options.data} is not what {folder} was started with: its text or its "
                "tokenizer has changed; restore it, or name another --out"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_yaml(options, folder / OPTIONS_FILE)  # from here on --resume finds the run
    record = {
        "corpus": corpus.key,
        "train_tokens": len(corpus.train.tokens),
        "validation_tokens": len(corpus.validation.tokens),
        "command": command,
        "versions": {
            "stablemask": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    _write_json(folder / RUN_FILE, record)


def _config_for(options: PretrainOptions, corpus: Corpus) -> Any:
    tokens = len(corpus.tokenizer)
    # A tokenizer that was given may be larger than the preset's vocabulary; 64 suits the hardware.
    vocab_size = _given(options.vocab_size)
    if options.tokenizer is not None:
        vocab_size = max(vocab_size, math.ceil(tokens / 64) * 64)
    return options.model_config(
        vocab_size=vocab_size,
        eos_token_id=corpus.tokenizer.eos_token_id,
        bos_token_id=corpus.tokenizer.bos_token_id,
        pad_token_id=corpus.tokenizer.pad_token_id,
    )


def _build_trainer(
    options: PretrainOptions,
    folder: Path,
    model: StableMaskForCausalLM,
    corpus: Corpus,
    checkpoint: Path | None,
) -> LanguageModelTrainer:
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=_given(options.steps),
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": options.min_learning_rate},
        warmup_steps=_given(options.warmup),
        weight_decay=options.weight_decay,
        adam_beta1=options.beta1,
        adam_beta2=options.beta2,
        max_grad_norm=options.clip,
        use_cpu=not on_gpu,
        bf16=options.dtype == "bfloat16",
        torch_compile=options.compile,
        logging_steps=options.log_every,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=options.eval_every,
        save_strategy="steps",
        save_steps=_given(options.save_every),
        seed=options.seed,
        data_seed=options.seed,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        prediction_loss_only=True,
        disable_tqdm=True,
        report_to=["wandb"] if options.wandb else [],
        run_name=folder.name,
    )
    if options.gradient_checkpointing:
        # Transformers has renamed it; older versions know only the second name.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    blocks = min(len(corpus.validation), math.ceil(options.eval_tokens / _given(options.context)))
    trainer = LanguageModelTrainer(
        model=model,
        args=arguments,
        train_dataset=corpus.train,
        eval_dataset=Subset(corpus.validation, range(blocks)),
        processing_class=corpus.tokenizer,
        keep=options.keep_checkpoints,
    )
    trainer.remove_callback(PrinterCallback)
    world_size = arguments.world_size
    trainer.add_callback(Record(folder / METRICS_FILE, _tokens_per_step(options) * world_size))
    trainer.add_callback(StopWhenNotFinite())
    if options.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        begin = checkpoints.step_of(checkpoint) + 1 if checkpoint else None
        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=begin)
        trainer.add_callback(TensorBoardCallback(writer))
    return trainer


def _finish_run(
    folder: Path, options: PretrainOptions, trainer: LanguageModelTrainer, corpus: Corpus
) -> PretrainResult:
    """Evaluate on the whole validation split and write the model."""
    trainer.remove_callback(TensorBoardCallback)  # its writer has closed with the training
    metrics = trainer.evaluate(eval_dataset=corpus.validation)
    result = PretrainResult(folder, trainer.state.global_step, metrics["eval_loss"])
    partial = folder / "checkpoints" / checkpoints.INCOMPLETE
    shutil.rmtree(partial, ignore_errors=True)
    trainer.save_model(str(partial))
    for path in partial.iterdir():
        if path.name != "training_args.bin":  # a pickle, which nothing of ours reads
            path.replace(folder / path.name)
    shutil.rmtree(partial)
    record = json.loads((folder / RUN_FILE).read_text())
    record["result"] = {"step": result.step, "eval_loss": result.eval_loss}
    write_model_card(folder, options, record)
    _write_json(folder / RUN_FILE, record)
    return result


def command_line(options: PretrainOptions) -> str:
    """The command that gives these options, defaults left out."""
    words = ["stablemask", "pretrain"]
    for field in option_fields(PretrainOptions):
        value = getattr(options, field.name)
        if value == field.default or field.name in ("resume", "dry_run"):
            continue
        if isinstance(value, bool):
            words.append(field.flag if value else field.flag.replace("--", "--no-", 1))
        else:
            words += [field.flag, str(value)]
    return shlex.join(words)


def _write_json(path: Path, content: dict) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)
