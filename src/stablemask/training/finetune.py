"""Finetuning of any causal language model, and adapting one to StableMask.

What it shares with pretraining is in run.py and assembly.py; how the sink is taken out of a model, in adapting/.
"""

import copy
import math
import sys
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
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
from ..inference.model import check_length, check_token_ids, choose_device, decoder_layers
from ..reading import first_line
from .adapting.adapt import (
    adapting_data,
    calibrated,
    distillation,
    find_prefix,
    make_stablemask,
    settle,
)
from .adapting.calibration import Calibration
from .adapting.reading import front_tokens
from .adapting.table import measure, table
from .adapting.trainer import DistillingTrainer, frozen_copy
from .assembly import METRICS_FILE, build_trainer, finish_run, train
from .base_model import text_part
from .callbacks.progress import read_rows
from .card import write_finetune_card
from .finetune_options import FinetuneOptions
from .processes import is_main, main_first, on_main
from .run import RunResult, alone, begin_run, claim, command_line, given, start
from .sharding import shard
from .trainer import LanguageModelTrainer

WORSE = 0.5  # nats by which a held-out loss may end above what it was


@dataclass
class _Prepared:
    model: PreTrainedModel
    data: Any  # of the kind that `run.TrainingData` tells
    record: dict[str, Any]
    calibration: Calibration | None = None  # with ``adapt``


@alone
def finetune(options: FinetuneOptions) -> RunResult:
    """Train a model further, or go on with a run that was interrupted.

    With ``adapt`` a softmax model becomes a StableMask model, and the attention sink is taken out of it: see
    the package ``adapting``.

    Raises:
        InputError: an option, the model, the data or the run folder is not usable; nothing was written but,
            with ``adapt``, what ``resume`` goes on with.
        RunError: the loss or its gradients are no longer finite, and the last checkpoint is kept; or the
            held-out loss ended more than 0.5 nats above what it was before (with ``adapt``, above its
            teacher's), and the model is kept too.
    """
    command = command_line(options)
    begun = start(options)
    options, folder, checkpoint = begun.options, begun.folder, begun.checkpoint
    if begun.finished is not None:
        on_main(lambda: _check_held_out(folder))
        return begun.finished

    prepared = main_first(lambda: _prepare(options, folder))
    if is_main():
        _say_what_was_cut(prepared.record)
    begin_run(folder, options, prepared.data.key, {**prepared.record, "command": command})
    set_seed(options.seed)
    trainer = _build_trainer(options, folder, prepared, checkpoint)
    stopped_by = train(trainer, checkpoint)
    if stopped_by is not None:
        return RunResult(folder, trainer.state.global_step, None, stopped_by)
    more: dict[str, Any] = {}
    if isinstance(trainer, DistillingTrainer):
        trainer.finish()
        more = {"adapting": on_main(lambda: _before_and_after(trainer, prepared))}
    settings = getattr(prepared.model.config.get_text_config(decoder=True), "stablemask", None)
    result = finish_run(
        folder,
        options,
        trainer,
        prepared.data,
        partial(_save, trainer, options.merge),
        partial(write_finetune_card, folder, options, settings),
        more,
    )
    on_main(lambda: _check_held_out(folder))
    return result


def describe_finetuning(options: FinetuneOptions) -> str:
    """What a run would do, with the model and the data checked and nothing written."""
    options = options.resolved()
    tokenizer = load_tokenizer(options.model)
    data, record = _load_data(options, tokenizer)
    model = _load_model(options, record)
    if options.adapt:
        make_stablemask(model, options)
        prefix = find_prefix(model, tokenizer, data, options)
    _say_what_was_cut(record)
    trained_model = _with_adapter(model, options) if options.lora else model
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(p.numel() for p in trained_model.parameters() if p.requires_grad)
    lines = [f"model       {options.model}, {total:,} parameters, {trained:,} of them trained"]
    if data is not None:
        kind = "conversations" if record["conversations"] else f"blocks of {options.context}"
        lines.append(
            f"data        {len(data.train):,} {kind} to train on, {record['train_tokens']:,} "
            f"tokens; {len(data.validation):,} held out"
        )
    if options.adapt:
        settings = model.config.get_text_config(decoder=True).stablemask
        settings = {name: value for name, value in settings.items() if name != "shift"}
        own = given(options.texts)
        lines += [
            f"prefix      {prefix}",
            f"adaptation  {settings}, a shift for each layer and head",
            f"texts       {own:,} of {options.context} tokens, {own * given(options.context):,} tokens that the "
            "model writes itself",
        ]
    if options.steps is not None:
        batch = given(options.global_batch_size)
        passes = ""
        if data is not None and not options.adapt:
            passes = f", {options.steps * batch / len(data.train):.2f} passes"
        lines.append(f"training    {options.steps:,} steps of {batch}{passes}")
    return "\n".join(lines)


def _prepare(options: FinetuneOptions, folder: Path) -> _Prepared:
    """The model and the data, each checked against the other."""
    tokenizer = load_tokenizer(options.model)
    data, record = _load_data(options, tokenizer)
    model = _load_model(options, record)
    if not options.adapt:
        return _Prepared(model, data, record)
    make_stablemask(model, options)
    prefix = find_prefix(model, tokenizer, data, options, folder)
    if is_main():
        print(f"prefix {prefix}", file=sys.stderr)
    claim(folder, options)  # what follows takes long, and a run that is resumed goes on with it
    adapting = adapting_data(model, tokenizer, data, options, prefix.token, folder)
    calibration = calibrated(model, adapting, options, prefix, folder)
    record["prefix"] = calibration.notes["prefix"]
    return _Prepared(model, adapting, record, calibration)


def _load_data(
    options: FinetuneOptions, tokenizer: Any
) -> tuple[Corpus | ChatCorpus | None, dict[str, Any]]:
    """The user's data, where there is any, and what the record says of it."""
    if is_adapter(options.model):
        raise InputError(
            f"{options.model} is an adapter; merge it into its model (--merge) to train that further"
        )
    context = given(options.context)
    if options.data is None:
        return None, {"train_tokens": 0, "validation_tokens": 0, "conversations": {}}
    data: Corpus | ChatCorpus
    if is_chat(options.data, options.text_column):
        data = prepare_chat(options.data, tokenizer, context=context)
        sides = [data.train, data.validation]
        sizes = [side.num_tokens for side in sides]
        highest = max(int(ids.max()) for side in sides for ids, _ in side.conversations)
        conversations = {"train": len(data.train), "validation": len(data.validation)}
        conversations |= {"cut": data.cut, "left_out": data.left_out}
    else:
        front = len(front_tokens(tokenizer)) if options.adapt else 0
        data = prepare_corpus(
            options.data,
            block_size=context - front,
            tokenizer=options.model,
            text_column=options.text_column,
        )
        arrays = [data.train.tokens, data.validation.tokens]
        sizes = [len(tokens) for tokens in arrays]
        highest = max(int(tokens.max()) for tokens in arrays)
        conversations = {}
    return data, {
        "train_tokens": sizes[0],
        "validation_tokens": sizes[1],
        "conversations": conversations,
        "highest_token": highest,
    }


def _load_model(options: FinetuneOptions, record: dict[str, Any]) -> PreTrainedModel:
    # An optimizer needs the small changes that bfloat16 would round away; frozen weights do not.
    dtype = options.dtype if options.lora and not options.merge else "float32"
    model = load_model(options.model, dtype=dtype)
    if options.adapt:  # much is asked of it before the Trainer would move it
        model.to(choose_device(None))  # type: ignore[arg-type]
    check_token_ids(model, [record.pop("highest_token", 0)])
    check_length(model, given(options.context) + options.adapt, "the context")
    if options.lora:
        with torch.device("meta"):
            _with_adapter(type(model)(copy.deepcopy(model.config)), options)
    _freeze_other_parts(model)
    _freeze_below(model, options.first_layer)
    return model


def _before_and_after(trainer: DistillingTrainer, prepared: _Prepared) -> dict[str, Any]:
    """The table of an adapted model, printed."""
    model: Any = trainer.model
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    assert prepared.calibration is not None
    after = measure(model, prepared.data.validation, None)
    columns = {**prepared.calibration.notes["before"], "adapted": after}
    print(table(columns), file=sys.stderr)
    return columns


def _build_trainer(
    options: FinetuneOptions, folder: Path, prepared: _Prepared, checkpoint: Path | None
) -> LanguageModelTrainer:
    model: Any = prepared.model
    arguments: dict[str, Any] = {"eval_on_start": checkpoint is None}
    if prepared.calibration is not None:
        options = replace(options, probe_tokens=0)  # its table tells more
        teacher = None if options.lora else frozen_copy(model, getattr(torch, options.dtype))
        settle(model, prepared.calibration)
        distilled = distillation(teacher, prepared.calibration)
        arguments["make"] = partial(DistillingTrainer, distillation=distilled)
    if options.lora:
        model = _with_adapter(model, options)
    if options.fsdp:
        shard(model, dtype=options.dtype, compile=options.compile)
    if prepared.calibration is not None or isinstance(prepared.data, ChatCorpus):
        arguments["collate"] = pad_conversations
    return build_trainer(
        options,
        folder,
        model,
        prepared.data,
        checkpoint,
        callbacks=(_EvaluateAtTheEnd(),),
        **arguments,
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
    rows = read_rows(folder / METRICS_FILE)
    losses: dict[int, float] = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    if 0 not in losses:
        return
    # Each run ends with an evaluation, of which a loss that is not finite is left out.
    before, after = losses[0], losses.get(rows[-1]["step"], math.nan)
    if not after - before <= WORSE:
        raise RunError(
            f"{folder}: the training has harmed the model: its loss on held-out text was {before:.4f} and is "
            f"{after:.4f} (perplexity {perplexity_text(perplexity_of(before))}, now "
            f"{perplexity_text(perplexity_of(after))}). The model is written; try a lower "
            "--learning-rate, or where a sink is taken out more --steps"
        )


def _freeze_other_parts(model: PreTrainedModel) -> None:
    """What no text reaches stays as it is: DDP would wait for gradients."""
    reached = {id(parameter) for part in text_part(model) for parameter in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in reached:
            parameter.requires_grad_(False)


def _freeze_below(model: PreTrainedModel, first_layer: int) -> None:
    if first_layer == 0:
        return
    layers = decoder_layers(model)
    if first_layer >= len(layers):
        raise InputError(f"first_layer must be below the model's {len(layers)}, got {first_layer}")
    for module in (model.get_input_embeddings(), *layers[:first_layer]):
        module.requires_grad_(False)


def _with_adapter(model: PreTrainedModel, options: FinetuneOptions) -> Any:
    """The model with an adapter at all linear layers of its text part, but for its output.

    Raises:
        InputError: it can have none.
    """
    from peft import LoraConfig, get_peft_model

    reached = {module for part in text_part(model) for module in part.modules()}
    others = [
        name
        for name, module in model.named_modules()
        if (module not in reached and not any(module.children())) or _is_more_than_linear(module)
    ]
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        target_modules="all-linear",
        exclude_modules=others or None,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # PEFT asks by a name Transformers has changed
        try:
            return get_peft_model(model, config)
        except ValueError as error:
            raise InputError(f"{options.model} can have no adapter: {first_line(error)}") from error


def _is_more_than_linear(module: nn.Module) -> bool:
    """Such as a router of experts, whose output is no product to add to."""
    return isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward


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
