"""What a pretraining run can be told, and the checks that need no data."""

import dataclasses
import importlib.util
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError
from ..models.configuration import ATTENTION_KINDS, POSITION_ENCODINGS, StableMaskConfig
from ..models.presets import PRESETS, preset_config
from ..options import option

# Options that may differ between the parts of a run that was interrupted: they change nothing that
# is computed.
FREE_ON_RESUME = {"out", "resume", "dry_run", "tensorboard", "wandb", "keep_checkpoints"}


@dataclass(kw_only=True)
class PretrainOptions:
    """Options of ``stablemask pretrain``; the defaults suit the ``tiny`` preset."""

    steps: int | None = option(None, "optimizer steps; only --dry-run goes without")
    out: str | None = option(None, "folder for the run and its model; only --dry-run goes without")
    preset: str = option("tiny", "size of the model", choices=tuple(PRESETS))
    data: str = option("builtin", "builtin, a file or folder of text, or hub:OWNER/NAME[:CONFIG]")
    text_column: str = option("text", "column that holds the text, in jsonl and parquet")
    tokenizer: str | None = option(None, "existing tokenizer; by default one is trained")
    vocab_size: int | None = option(None, "vocabulary; by default the preset's")
    attention: str = option("stablemask", "kind of attention", choices=ATTENTION_KINDS)
    position: str = option("rope", "position encoding", choices=POSITION_ENCODINGS)
    gamma: float | str | None = option(
        None, "decay of the pseudo scores: a number, or slopes; by default 1 / context"
    )
    horizon: int | None = option(None, "columns of the pseudo mask; by default infinitely many")
    context: int | None = option(None, "tokens in a training block; by default the preset's")
    batch_size: int = option(16, "blocks in a batch, on each device")
    gradient_accumulation: int = option(1, "batches in a step")
    learning_rate: float = option(1e-3, "peak learning rate of AdamW")
    min_learning_rate: float = option(0.1, "where the cosine ends, as a share of the peak")
    warmup: int | None = option(None, "steps of linear warm-up; by default a tenth of the steps")
    weight_decay: float = option(0.1, "decoupled weight decay of AdamW")
    beta1: float = option(0.9, "decay of AdamW's first moment")
    beta2: float = option(0.98, "decay of AdamW's second moment")
    clip: float = option(1.0, "largest norm of the gradients")
    dtype: str = option(
        "auto",
        "float32, or bfloat16 under autocast; auto takes bfloat16 where the hardware has it",
        choices=("auto", "float32", "bfloat16"),
    )
    compile: bool = option(False, "run the model through torch.compile")
    gradient_checkpointing: bool = option(False, "recompute activations to save memory")
    log_every: int = option(10, "steps between log lines")
    eval_every: int | None = option(None, "steps between evaluations; by default a tenth of all")
    eval_tokens: int = option(65536, "validation tokens of an evaluation during training")
    save_every: int | None = option(None, "steps between checkpoints; by default a tenth of all")
    keep_checkpoints: int = option(2, "how many of the latest checkpoints stay")
    seed: int = option(0, "of the weights and the order of the data")
    tensorboard: bool = option(True, "write event files for TensorBoard")
    wandb: bool = option(False, "log to Weights & Biases")
    resume: bool = option(False, "go on with the run in --out")
    dry_run: bool = option(False, "print what the run would cost, and stop")

    def resolved(self) -> "PretrainOptions":
        """A copy in which every default that depends on another option is filled in, checked.

        Raises:
            InputError: an option is out of its range.
        """
        if self.preset not in PRESETS:
            raise InputError(f"preset must be one of {', '.join(PRESETS)}, got {self.preset!r}")
        preset = PRESETS[self.preset]
        for name in ("steps", "out"):
            if getattr(self, name) is None and not self.dry_run:
                raise InputError(f"{name} must be given: --{name}")
        tenth = max(1, (self.steps or 0) // 10)
        defaults = {
            "vocab_size": preset["vocab_size"],
            "context": preset["max_position_embeddings"],
            "warmup": min(tenth, 2000),
            "eval_every": tenth,
            "save_every": tenth,
            "dtype": default_dtype(),
        }
        unset = {
            name: value for name, value in defaults.items() if getattr(self, name) in (None, "auto")
        }
        options = dataclasses.replace(self, **unset)
        options._check()
        return options

    def _check(self) -> None:
        at_least = {
            "steps": 1, "batch_size": 1, "gradient_accumulation": 1, "log_every": 1,
            "eval_every": 1, "save_every": 1, "eval_tokens": 1, "keep_checkpoints": 1,
            "context": 2, "warmup": 0, "seed": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        ranges: dict[str, tuple[float, float]] = {
            "min_learning_rate": (0.0, 1.0),
            "beta1": (0.0, 1.0),
            "beta2": (0.0, 1.0),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise InputError(
                    f"{name} must be in [{low:g}, {high:g}], got {getattr(self, name)}"
                )
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be greater than 0, got {getattr(self, name)}")
        if not self.weight_decay >= 0:
            raise InputError(f"weight_decay must be at least 0, got {self.weight_decay}")
        if self.wandb and not _installed("wandb"):
            raise InputError("wandb is not installed; pip install wandb, or leave out --wandb")
        self.model_config()

    def model_config(self, **overrides: Any) -> StableMaskConfig:
        """The model these options describe; ``overrides`` are fields of its configuration."""
        settings = None
        if self.attention == "stablemask":
            settings = {"gamma": self.gamma, "horizon": self.horizon}
        elif self.gamma is not None or self.horizon is not None:
            raise InputError(
                f"gamma and horizon go with attention stablemask, not {self.attention}"
            )
        fields = {
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context,
            "attention": self.attention,
            "position_encoding": self.position,
            "stablemask": settings,
        }
        try:
            return preset_config(self.preset, **{**fields, **overrides})
        except InputError:
            raise
        except ValueError as error:
            raise InputError(str(error)) from error


def default_dtype() -> str:
    """``bfloat16`` where the hardware multiplies it faster than float32, else ``float32``."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if torch.cpu._is_amx_tile_supported() else "float32"


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # its entry in sys.modules says that it cannot be imported
        return False
