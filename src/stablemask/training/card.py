"""The model card of a run."""

import math
from pathlib import Path
from typing import Any

from .options import PretrainOptions

_CARD = """\
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
| training data | {data}, {train_tokens:,} tokens |
| training | {steps:,} steps of {tokens_per_step:,} tokens, context {context}, {dtype} |
| validation loss | {eval_loss:.4f} nats a token (perplexity {perplexity:.2f}), on {validation_tokens:,} tokens |

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


def write_model_card(folder: Path, options: PretrainOptions, record: dict[str, Any]) -> None:
    """Write ``README.md`` from the options and the record of a finished run."""
    assert options.context is not None
    assert options.steps is not None
    eval_loss = record["result"]["eval_loss"]
    tokens_per_step = options.batch_size * options.gradient_accumulation * options.context
    card = _CARD.format(
        name=folder.name,
        folder=options.out,
        tags=", ".join(dict.fromkeys(["stablemask", options.attention])),
        preset=options.preset,
        attention=options.attention,
        position=options.position,
        data=options.data,
        train_tokens=record["train_tokens"],
        validation_tokens=record["validation_tokens"],
        steps=options.steps,
        tokens_per_step=tokens_per_step,
        context=options.context,
        dtype=options.dtype,
        eval_loss=eval_loss,
        perplexity=math.exp(eval_loss),
        command=record["command"],
    )
    (folder / "README.md").write_text(card)
