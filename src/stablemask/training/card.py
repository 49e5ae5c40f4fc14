"""The model card of a run."""

from pathlib import Path
from typing import Any

from ..evaluation.perplexity import perplexity_of, perplexity_text
from .options import FinetuneOptions, PretrainOptions

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


def write_pretrain_card(folder: Path, options: PretrainOptions, record: dict[str, Any]) -> None:
    """Write ``README.md`` from the options and the record of a finished pretraining."""
    assert options.context is not None
    assert options.steps is not None
    eval_loss = record["result"]["eval_loss"]
    assert options.global_batch_size is not None
    tokens_per_step = options.global_batch_size * options.context
    card = _PRETRAIN_CARD.format(
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
    (folder / "README.md").write_text(card)


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
            f"{name} {value}" for name, value in settings.items() if value is not None
        )
        attention = f"StableMask, {pairs}"
        if options.adapt:
            attention += f", brought in over {options.shift_steps} steps"
    adapter = options.lora and not options.merge
    eval_loss = record["result"]["eval_loss"]
    card = _FINETUNE_CARD.format(
        name=folder.name,
        folder=options.out,
        model=options.model,
        library="peft" if adapter else "transformers",
        what=f"A LoRA adapter (rank {options.lora_rank})" if adapter else "The weights",
        attention=attention,
        data=options.data,
        train_tokens=record["train_tokens"],
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
    (folder / "README.md").write_text(card)
