"""The model card of a run."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..evaluation.perplexity import perplexity_of, perplexity_text
from ..models.settings import in_short
from ..writing import write_whole
from .adapting.table import table
from .finetune_options import FinetuneOptions
from .pretrain_options import PretrainOptions

_PRETRAIN_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
---

# {name}

A causal language model of the `{preset}` preset with `{attention}` attention and `{position}`
positions, pretrained from scratch with `stablemask`
([StableMask](https://arxiv.org/abs/2402.04779)).

| | |
|---|---|
| training data | {data} |
| training | {steps:,} steps of {tokens_per_step:,} tokens, context {context}, {dtype} |
| validation loss | {eval_loss:.4f} nats a token (perplexity {perplexity}), on {validation_tokens:,} tokens |
{note}
```sh
{command}
```

```python
import stablemask.hf
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```
"""

# What a reader must know of a kind of attention.
NOTES = {
    "stablemask-paper": (
        "`stablemask-paper` is StableMask as published: a horizon of the training length and head slopes. "
        "Of rows from that length on the paper says only that their pseudo mass falls with the position, "
        "for its formula is lost in the text that we have: one pseudo column, log M(i) = -gamma i from row "
        "n - 1 on, is our reading of it."
    ),
}


def write_pretrain_card(folder: Path, options: PretrainOptions, record: dict[str, Any]) -> None:
    """Write ``README.md`` from the options and the record of a finished pretraining."""
    assert options.context is not None
    assert options.steps is not None
    eval_loss = record["result"]["eval_loss"]
    assert options.global_batch_size is not None
    tokens_per_step = options.global_batch_size * options.context
    reading = NOTES.get(options.attention, "")
    card = _PRETRAIN_CARD.format(
        note=reading and f"\n{reading}\n",
        name=folder.name,
        folder=options.out,
        tags=", ".join(dict.fromkeys(["stablemask", options.attention])),
        preset=options.preset,
        attention=options.attention,
        position=options.position,
        data=_data(options, record["train_tokens"]),
        validation_tokens=min(
            record["validation_tokens"], options.final_eval_tokens or record["validation_tokens"]
        ),
        steps=options.steps,
        tokens_per_step=tokens_per_step,
        context=options.context,
        dtype=options.dtype,
        eval_loss=eval_loss,
        perplexity=perplexity_text(perplexity_of(eval_loss)),
        command=record["command"],
    )
    write_whole(folder / "README.md", card)


_FINETUNE_CARD = """\
---
base_model: {model}
library_name: {library}
pipeline_tag: text-generation
tags: [stablemask]
---

# {name}

{what} of `{model}`, finetuned with `stablemask`
([StableMask](https://arxiv.org/abs/2402.04779)).

| | |
|---|---|
| attention | {attention} |
| training data | {data} |
| training | {steps:,} steps of {batch} {unit}, context {context}, {dtype}, learning rate {rate:g} |
| validation loss | {eval_loss:.4f} nats a token (perplexity {perplexity}) |
{adapted}
```sh
{command}
```

```python
import stablemask.hf

model = stablemask.hf.load_model("{folder}")
```
"""


def _data(options: PretrainOptions, train_tokens: int | None) -> str:
    name = ", ".join(options.mixture) or options.data
    return f"{name}, streamed" if train_tokens is None else f"{name}, {train_tokens:,} tokens"


def write_finetune_card(
    folder: Path, options: FinetuneOptions, settings: dict[str, Any] | None, record: dict[str, Any]
) -> None:
    """Write ``README.md`` from the options and the record of a finished finetuning.

    Args:
        settings: ``config.stablemask`` of the model.
    """
    attention = "the model's own"
    if settings is not None:
        pairs = ", ".join(
            f"{name} {value}" for name, value in in_short(settings).items() if value is not None
        )
        attention = f"StableMask, {pairs}"
    adapter = options.lora and not options.merge
    eval_loss = record["result"]["eval_loss"]
    card = _FINETUNE_CARD.format(
        name=folder.name,
        folder=options.out,
        model=options.model,
        library="peft" if adapter else "transformers",
        what=f"A LoRA adapter (rank {options.lora_rank})" if adapter else "The weights",
        attention=attention,
        data=" and ".join(_sources(options)),
        adapted=_adapted(record),
        steps=options.steps,
        batch=options.global_batch_size,
        unit="conversations" if record["conversations"] else "blocks",
        context=options.context,
        dtype=options.dtype,
        rate=options.learning_rate,
        eval_loss=eval_loss,
        perplexity=perplexity_text(perplexity_of(eval_loss)),
        command=record["command"],
    )
    write_whole(folder / "README.md", card)


def _sources(options: FinetuneOptions) -> Iterator[str]:
    if options.adapt and options.texts:
        yield f"{options.texts:,} texts that the model wrote itself"
    if options.data is not None:
        yield options.data


def _adapted(record: dict[str, Any]) -> str:
    """What taking the sink out has changed, where that was done."""
    if "adapting" not in record:
        return ""
    prefix = record["prefix"]["text"]
    before = "with its prefix" if prefix else "as it was"
    learned = f"`{prefix}` in front of each text" if prefix else "nothing in front of a text"
    return (
        "\nThe attention sink was taken out of it: it learned from itself "
        f"with {learned} ({before}). On held-out text:\n\n{table(record['adapting'])}\n"
    )
