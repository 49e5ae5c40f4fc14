"""Pretraining: from options to a folder with a model. What it shares with other runs is in run.py and assembly.py."""

import math
from functools import partial
from typing import Any

from transformers import set_seed

from ..data import Corpus, prepare_corpus, prepare_mixture
from ..data.corpus import prepare_stream
from ..data.mixture import parse_mixture
from ..data.tokenizer import vocabulary_size
from ..models.modeling import StableMaskForCausalLM
from .assembly import build_trainer, finish_run, train
from .card import write_pretrain_card
from .pretrain_options import PretrainOptions
from .processes import main_first
from .run import RunResult, alone, begin_run, command_line, given, start
from .sequences import share_sequences
from .sharding import shard

OPTIONS_FILE = f"{PretrainOptions.command}.yaml"


@alone
def pretrain(options: PretrainOptions) -> RunResult:
    """Train a model from scratch, or go on with a run that was interrupted.

    Raises:
        InputError: an option, the data or the run folder is not usable; nothing was written.
        RunError: the loss or its gradients are no longer finite; the last checkpoint is kept.
    """
    command = command_line(options)
    begun = start(options)
    options, folder, checkpoint = begun.options, begun.folder, begun.checkpoint
    if begun.finished is not None:
        return begun.finished

    corpus = main_first(lambda: prepare_data(options))
    record: dict[str, Any] = {
        "train_tokens": corpus.num_train_tokens,
        "validation_tokens": corpus.validation.num_tokens,
        "command": command,
    }
    begin_run(folder, options, corpus.key, record)
    set_seed(options.seed)
    model = StableMaskForCausalLM(_config_for(options, corpus))
    model.chunked_loss = True
    sequences = None
    if options.context_parallel > 1:
        sequences = share_sequences(model, options.context_parallel)
    if options.fsdp:
        shard(model, dtype=options.dtype, compile=options.compile)
    trainer = build_trainer(options, folder, model, corpus, checkpoint, sequences=sequences)
    stopped_by = train(trainer, checkpoint)
    if stopped_by is not None:
        return RunResult(folder, trainer.state.global_step, None, stopped_by)
    write_card = partial(write_pretrain_card, folder, options)
    return finish_run(folder, options, trainer, corpus, trainer.save_model, write_card)


def prepare_data(options: PretrainOptions) -> Corpus:
    """The data of a run whose options are resolved, and its tokenizer."""
    settings: dict[str, Any] = {
        "block_size": given(options.context),
        "tokenizer": options.tokenizer,
        "text_column": options.text_column,
    }
    if options.streaming:
        return prepare_stream(
            list(parse_mixture(options.mixture).items()) if options.mixture else options.data,
            shuffle_buffer=options.shuffle_buffer,
            seed=options.seed,
            eval_tokens=options.eval_tokens,
            global_batch_size=given(options.global_batch_size),
            **settings,
        )
    settings["vocab_size"] = given(options.vocab_size)
    if options.mixture:
        return prepare_mixture(options.mixture, seed=options.seed, **settings)
    return prepare_corpus(options.data, **settings)


def _config_for(options: PretrainOptions, corpus: Corpus) -> Any:
    tokens = vocabulary_size(corpus.tokenizer)
    # A tokenizer that was given may be larger than the preset's vocabulary; 64 suits the hardware.
    vocab_size = given(options.vocab_size)
    if tokens > vocab_size:
        vocab_size = math.ceil(tokens / 64) * 64
    return options.model_config(
        vocab_size=vocab_size,
        eos_token_id=corpus.tokenizer.eos_token_id,
        bos_token_id=corpus.tokenizer.bos_token_id,
        pad_token_id=corpus.tokenizer.pad_token_id,
    )
