"""Finetuning of any causal language model, and adapting one to StableMask.

What it shares with pretraining is in run.py; how the pseudo mass comes in, in adapt.py.
"""

import math
import sys
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from ..data import Corpus, load_tokenizer, prepare_corpus
from ..data.chat import ChatCorpus, is_chat, pad_conversations, prepare_chat
from ..errors import InputError, RunError
from ..evaluation.perplexity import perplexity_of, perplexity_text
from ..hf import load_model
from ..hf.loading import is_adapter
from ..inference.model import check_length, check_token_ids, decoder_layers
from ..reading import parse_json, reading
from . import checkpoints
from .adapt import ShiftSchedule, adapt
from .card import write_finetune_card
from .options import FinetuneOptions
from .processes import is_main, main_first, on_main
from .run import (
    METRICS_FILE,
    RunResult,
    alone,
    begin_run,
    build_trainer,
    command_line,
    finish_run,
    given,
    start,
    train,
)
from .sharding import shard
from .trainer import LanguageModelTrainer

CALIBRATION = (
    2048  # held-out tokens that the size of the mass is found with, where contexts are full
)
WORSE = 0.5  # nats by which a held-out loss may end above what it was


@dataclass
class _Prepared:
    model: PreTrainedModel
    data: Corpus | ChatCorpus
    schedule: ShiftSchedule | None
    record: dict[str, Any]


@alone
def finetune(options: FinetuneOptions) -> RunResult:
    """Train a model further, or go on with a run that was interrupted.

    With ``adapt`` a softmax model becomes a StableMask model: the pseudo mass begins so small that it
    changes nothing, and comes in over ``shift_steps``.

    Raises:
        InputError: an option, the model, the data or the run folder is not usable; nothing was written.
        RunError: the loss or its gradients are no longer finite, and the last checkpoint is kept; or the
            held-out loss ended more than 0.5 nats above what it was before, and the model is kept too.
    """
    command = command_line(options)
    begun = start(options)
    options, folder, checkpoint = begun.options, begun.folder, begun.checkpoint
    if begun.finished is not None:
        on_main(lambda: _check_held_out(folder))
        return begun.finished

    prepared = main_first(lambda: _prepare(options))
    if prepared.schedule is not None:
        schedule = prepared.schedule
        options = replace(options, shift_from=schedule.shift_from, shift_to=schedule.shift_to)
    if is_main():
        _say_what_was_cut(prepared.record)
    begin_run(folder, options, prepared.data.key, {**prepared.record, "command": command})
    set_seed(options.seed)
    trainer = _build_trainer(options, folder, prepared, checkpoint)
    stopped_by = train(trainer, checkpoint)
    if stopped_by is not None:
        return RunResult(folder, trainer.state.global_step, None, stopped_by)
    settings = getattr(prepared.model.config.get_text_config(decoder=True), "stablemask", None)
    result = finish_run(
        folder,
        options,
        trainer,
        prepared.data,
        partial(_save, trainer, options.merge),
        partial(write_finetune_card, folder, options, settings),
    )
    on_main(lambda: _check_held_out(folder))
    return result


def describe_finetuning(options: FinetuneOptions) -> str:
    """What a run would do, with the model and the data checked and nothing written."""
    options = options.resolved()
    prepared = _prepare(options)
    _say_what_was_cut(prepared.record)
    model = _with_adapter(prepared.model, options) if options.lora else prepared.model
    total = sum(parameter.numel() for parameter in prepared.model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kind = "conversations" if prepared.record["conversations"] else f"blocks of {options.context}"
    data = prepared.data
    lines = [
        f"model       {options.model}, {total:,} parameters, {trained:,} of them trained",
        f"data        {len(data.train):,} {kind} to train on, {prepared.record['train_tokens']:,} "
        f"tokens; {len(data.validation):,} held out",
    ]
    if prepared.schedule is not None:
        schedule = prepared.schedule
        settings = {k: v for k, v in schedule.settings.items() if k != "shift"}
        lines.append(
            f"adaptation  {settings}, log M shifted by {schedule.shift_at(0):g} at first and by "
            f"{schedule.shift_to:g} in the end"
        )
    if options.steps is not None:
        batch = given(options.global_batch_size)
        passes = options.steps * batch / len(data.train)
        ramp = f", the first {options.shift_steps:,} with a rising shift" if options.adapt else ""
        lines.append(f"training    {options.steps:,} steps of {batch}, {passes:.2f} passes{ramp}")
    return "\n".join(lines)


def _prepare(options: FinetuneOptions) -> _Prepared:
    """The model and the data, each checked against the other."""
    if is_adapter(options.model):
        raise InputError(
            f"{options.model} is an adapter; merge it into its model (--merge) to train that further"
        )
    context = given(options.context)
    tokenizer = load_tokenizer(options.model)
    data: Corpus | ChatCorpus
    if is_chat(options.data, options.text_column):
        data = prepare_chat(options.data, tokenizer, context=context)
        sides = [data.train, data.validation]
        sizes = [side.num_tokens for side in sides]
        highest = max(int(ids.max()) for side in sides for ids, _ in side.conversations)
        conversations = {"train": len(data.train), "validation": len(data.validation)}
        conversations |= {"cut": data.cut, "left_out": data.left_out}
    else:
        data = prepare_corpus(
            options.data,
            block_size=context,
            tokenizer=options.model,
            text_column=options.text_column,
        )
        arrays = [data.train.tokens, data.validation.tokens]
        sizes = [len(tokens) for tokens in arrays]
        highest = max(int(tokens.max()) for tokens in arrays)
        conversations = {}
    record = {
        "train_tokens": sizes[0],
        "validation_tokens": sizes[1],
        "conversations": conversations,
    }
    # An optimizer needs the small changes that bfloat16 would round away; frozen weights do not.
    dtype = options.dtype if options.lora and not options.merge else "float32"
    model = load_model(options.model, dtype=dtype)
    check_token_ids(model, highest)
    check_length(model, context, "the context")
    _freeze_below(model, options.first_layer)
    schedule = adapt(model, options, _calibration_batch(data, context)) if options.adapt else None
    return _Prepared(model, data, schedule, record)


def _calibration_batch(data: Corpus | ChatCorpus, context: int) -> dict[str, torch.Tensor]:
    count = min(max(2, CALIBRATION // context), len(data.validation))
    examples = [data.validation[i] for i in range(count)]
    return pad_conversations(examples, given(data.tokenizer.pad_token_id))


def _build_trainer(
    options: FinetuneOptions, folder: Path, prepared: _Prepared, checkpoint: Path | None
) -> LanguageModelTrainer:
    model: Any = prepared.model
    if checkpoint is not None and prepared.schedule is not None:
        # An adapter is only loaded into a model that runs what it was saved with.
        prepared.schedule.set_step(checkpoints.step_of(checkpoint))
    if options.lora:
        model = _with_adapter(model, options)
    if options.fsdp:
        shard(model, dtype=options.dtype, compile=options.compile)
    arguments: dict[str, Any] = {"eval_on_start": checkpoint is None}
    if isinstance(prepared.data, ChatCorpus):
        pad_token_id = given(prepared.data.tokenizer.pad_token_id)
        arguments["collate"] = partial(pad_conversations, pad_token_id=pad_token_id)
    callbacks: list[TrainerCallback] = [_EvaluateAtTheEnd()]
    if prepared.schedule is not None:
        callbacks.append(prepared.schedule)
    return build_trainer(
        options, folder, model, prepared.data, checkpoint, callbacks=tuple(callbacks), **arguments
    )


class _EvaluateAtTheEnd(TrainerCallback):
    """On the same tokens as before the first step."""

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


def _check_held_out(folder: Path) -> None:
    """Raise RunError where a finished run has made its model worse than it was."""
    losses: dict[int, float] = {}
    file = folder / METRICS_FILE
    with reading(file):
        lines = file.read_text(encoding="utf-8").splitlines()
    for line in lines:
        try:
            row = parse_json(line)
        except ValueError as error:
            raise InputError(f"{file} is damaged: {line[:60]!r} is not JSON") from error
        if any(name.startswith("eval_") for name in row):  # a loss that is not finite is left out
            losses[row["step"]] = row.get("eval_loss", math.nan)
    if 0 not in losses:
        return
    before, after = losses[0], losses[max(losses)]
    if not after - before <= WORSE:
        raise RunError(
            f"{folder}: the training has harmed the model: its loss on held-out text was {before:.4f} and is "
            f"{after:.4f} (perplexity {perplexity_text(perplexity_of(before))}, now "
            f"{perplexity_text(perplexity_of(after))}). The model is written; try a lower --learning-rate, or "
            "where StableMask is brought in a lower --shift-to"
        )


def _freeze_below(model: PreTrainedModel, first_layer: int) -> None:
    if first_layer == 0:
        return
    layers = decoder_layers(model)
    if first_layer >= len(layers):
        raise InputError(f"first_layer must be below the model's {len(layers)}, got {first_layer}")
    for module in (model.get_input_embeddings(), *layers[:first_layer]):
        module.requires_grad_(False)


def _with_adapter(model: PreTrainedModel, options: FinetuneOptions) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # PEFT asks by a name Transformers has changed
        return get_peft_model(model, config)


def _save(trainer: LanguageModelTrainer, merge: bool, folder: str) -> None:
    if merge:
        adapted: Any = trainer.model
        trainer.model = adapted.merge_and_unload()
    trainer.save_model(folder)


def _say_what_was_cut(record: dict[str, Any]) -> None:
    counts = record["conversations"]
    if counts:
        print(
            f"{counts['train']:,} conversations to train on, {counts['validation']:,} held out; "
            f"{counts['cut']:,} were longer than the context and cut, {counts['left_out']:,} of them "
            "left out, with nothing of the assistant left",
            file=sys.stderr,
        )
