"""Options of a finetuning, adapting a model to StableMask included."""

from __future__ import annotations

import dataclasses
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import InputError
from ..options import changed, check_least, option
from ..shell import pip_install
from .machine import default_dtype
from .options import TrainingOptions, installed

if TYPE_CHECKING:
    from typing_extensions import Self

# What the sink is taken out of a model with, where nothing else is given.
ADAPTING: dict[str, Any] = {"steps": 120, "context": 256, "batch_size": 4, "beta2": 0.99}
# Where no biases can stand for the prefix, there is more to learn.
WITHOUT_BIASES: dict[str, Any] = {"steps": 400, "learning_rate": 2e-4}
# Where they stand for its value alone, the key is left to learn; at the usual rate training leads away at first.
BIASES_OF_VALUES: dict[str, Any] = {"steps": 300, "learning_rate": 2e-5}


@dataclass(kw_only=True)
class FinetuneOptions(TrainingOptions):
    """Train a pretrained model further, or adapt it to StableMask.

    It learns from text or conversations; --adapt makes it a StableMask model.
    """

    command: ClassVar[str] = "finetune"

    data: str | None = option(  # type: ignore[assignment]  # of a run that has no text of its own
        None,
        "text or conversations: builtin, a file or folder, or hub:OWNER/NAME[:CONFIG]; --adapt goes "
        "without, and mixes it half and half with text that the model writes itself",
        group="data",
    )
    context: int | None = option(
        None,
        "tokens in a block, and the most of a conversation; by default the model's, at most 1024",
    )
    # These are filled in by `resolved`.
    batch_size: int | None = option(  # type: ignore[assignment]
        None, "blocks or conversations in a batch, on each device; by default 8"
    )
    learning_rate: float | None = option(  # type: ignore[assignment]
        None,
        "peak learning rate of AdamW; by default 5e-5; --lora wants about 2e-4",
        group="optimizer",
    )
    min_learning_rate: float = option(0.0, "where it ends, as a share of the peak")
    weight_decay: float = option(0.0, "decoupled weight decay of AdamW")
    beta2: float | None = option(  # type: ignore[assignment]
        None, "decay of AdamW's second moment; by default 0.999"
    )
    eval_tokens: int = option(16384, "validation tokens of an evaluation during training")

    model: str = option(MISSING, "folder or hub name of the model to start from", group="model")
    first_layer: int = option(0, "train from this layer on; all below it stays as it is")
    lora: bool = option(False, "train a low-rank adapter (LoRA) and leave the weights as they are")
    lora_rank: int = option(16, "with --lora, rank of the adapter")
    lora_alpha: int = option(32, "with --lora, its scale is this over the rank")
    merge: bool = option(False, "with --lora, write the merged model in place of the adapter")

    adapt: bool = option(
        False,
        "make a softmax model a StableMask model, and take its attention sink out of it; by default in "
        "120 steps of 4 blocks of 256 tokens with a beta2 of 0.99, where keys are normalised in 300 at a peak "
        "of 2e-5, with --lora or where attention can have no biases in 400 at 2e-4, evaluated and saved each quarter",
        group="adapting; all but the first go with --adapt",
    )
    texts: int | None = option(
        None,
        "texts that the model writes itself to learn from, 0 for the data alone; by default as many "
        "as it will read",
    )
    gamma: float | Literal["slopes"] | None = option(
        None, "decay of the pseudo scores: a number, or slopes; by default 1 / the model's context"
    )
    horizon: int | None = option(None, "columns of the pseudo mask; by default infinitely many")
    hold: int | Literal["never"] | None = option(
        None, "last position at which the mass falls, or never; by default the model's context - 1"
    )
    start: int = option(0, "first position with a pseudo mass; 1 leaves the first row alone")

    def resolved(self) -> Self:
        from ..hf.loading import load_without_weights
        from .adapting.biases import normalises_keys, takes_biases
        from .base_model import context_of

        defaults: dict[str, Any] = {
            "batch_size": 8, "learning_rate": 5e-5, "beta2": 0.999, "dtype": default_dtype(large=True),
        }  # fmt: skip
        if self.adapt:
            defaults |= ADAPTING
            model = None if self.lora else load_without_weights(self.model)
            if model is None or not takes_biases(model):
                defaults |= WITHOUT_BIASES
            elif normalises_keys(model):
                defaults |= BIASES_OF_VALUES
            # Evaluating often would take as long as the training, which is short.
            quarter = max(1, (self.steps or defaults["steps"]) // 4)
            defaults |= {"eval_every": quarter, "save_every": quarter}
        if self.context is None:
            longest = context_of(self.model)
            # The teacher reads one token more.
            defaults["context"] = min(defaults["context"], longest - 1) if self.adapt else longest
        options = self._filled(**defaults)
        if self.adapt and options.texts is None:
            assert options.steps is not None
            assert options.global_batch_size is not None
            own = options.steps * options.global_batch_size // (1 if self.data is None else 2)
            # Each is read once: read twice, they led the weights away. A few more are held out.
            options = dataclasses.replace(options, texts=max(own + own // 15, 2))
        return options

    def _check(self) -> None:
        super()._check()
        for switch, names in (
            ("adapt", ("gamma", "horizon", "hold", "start", "texts")),
            ("lora", ("lora_rank", "lora_alpha", "merge")),
        ):
            for name in changed(self, () if getattr(self, switch) else names):
                raise InputError(f"{name} goes with --{switch}")
        check_least(self, lora_rank=1, lora_alpha=1, start=0, first_layer=0)
        if self.data is None and not self.adapt:
            raise InputError("data must be given: --data")
        if self.texts is not None and (self.texts < 0 or self.texts == 1):
            raise InputError(f"texts must be 0, or at least 2, got {self.texts}")
        if self.data is None and self.texts == 0:
            raise InputError("with texts 0 the data is all there is: --data")
        for name in ("compile", "fsdp"):
            if self.adapt and getattr(self, name):
                raise InputError(
                    f"{name} does not go with adapt; adapt first, and train the result on with it"
                )
        if self.lora and self.fsdp:
            raise InputError(
                "fsdp goes without --lora, whose frozen weights need no shards of an optimizer"
            )
        if self.lora and self.first_layer:
            raise InputError("first_layer goes without --lora, whose adapter is in every layer")
        if self.lora and not installed("peft"):
            raise InputError(f"lora needs PEFT, which is not installed: {pip_install('train')}")
