"""Options of every training run, and the checks that need no data."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import InputError
from ..options import check_least, check_values, option
from ..reading import user_path
from .machine import default_dtype, world_size

if TYPE_CHECKING:
    from typing_extensions import Self

# What takes long to import is imported where it is used: `stablemask pretrain --help` reads this file.

# Options that may differ between the parts of a run: they change no weight, but for the number of steps,
# by which a run goes on where it had ended.
FREE_ON_RESUME = {
    "steps", "out", "resume", "dry_run", "tensorboard", "wandb", "keep_checkpoints", "async_save", "workers",
    "batch_size", "peak_flops", "devices", "final_eval_tokens", "log_every", "eval_every", "save_every",
    "probe_tokens",
}  # fmt: skip
# Options whose defaults follow from others or from the model: left out, they stay what they were in a run
# that is resumed.
KEPT_ON_RESUME = (
    "steps", "global_batch_size", "warmup", "eval_every", "save_every", "texts", "dtype",
)  # fmt: skip
SEEDS = 1 << 32  # that NumPy takes


@dataclass(kw_only=True)
class TrainingOptions:
    """Options of every training run; ``command`` names it and the file its options are kept in."""

    command: ClassVar[str]

    steps: int | None = option(None, "optimizer steps; --dry-run goes without", group="the run")
    out: str | None = option(None, "folder for the run and its model; --dry-run goes without")
    resume: bool = option(False, "go on with the run in --out, also to more --steps than it had")
    dry_run: bool = option(False, "check the options, print what would be done, and stop")
    seed: int = option(0, "of new weights, and of the order of the data")

    data: str = option(
        MISSING,
        "builtin[:packages], a file or folder of text, or hub:OWNER/NAME[:CONFIG]",
        group="data",
    )
    text_column: str = option("text", "column of a record's text; messages, for conversations")
    context: int | None = option(None, "tokens in a training block; by default the model's")
    batch_size: int = option(16, "blocks in a batch, on each device")
    global_batch_size: int | None = option(
        None, "blocks in a step, in as many batches as it takes; by default one on each device"
    )
    workers: int | None = option(
        None, "processes that load data, for each device; by default none, or one for streams"
    )

    learning_rate: float = option(1e-3, "peak learning rate of AdamW", group="optimizer")
    schedule: str = option("cosine", "how it falls to its end", choices=("cosine", "linear"))
    min_learning_rate: float = option(0.1, "where it ends, as a share of the peak")
    start_learning_rate: float = option(0.0, "where the warm-up begins, as a share of the peak")
    warmup: int | None = option(None, "steps of linear warm-up; by default a tenth of the steps")
    weight_decay: float = option(0.1, "decoupled weight decay of AdamW")
    beta2: float = option(0.98, "decay of AdamW's second moment")
    clip: float = option(1.0, "largest norm of the gradients")
    skip_spikes: float = option(0.0, "skip a loss so many deviations above the last ones, 0: none")

    dtype: str = option(
        "auto",
        "float32, or bfloat16 under autocast; auto takes bfloat16 where the hardware has it",
        choices=("auto", "float32", "bfloat16"),
        group="speed and memory",
    )
    compile: bool = option(False, "run the model through torch.compile")
    gradient_checkpointing: bool = option(False, "recompute activations to save memory")
    fsdp: bool = option(False, "shard weights, gradients and optimizer (FSDP2); by default DDP")
    peak_flops: float | None = option(
        None, "FLOP/s of one device in this dtype; by default known from its name"
    )

    log_every: int = option(10, "steps between log lines", group="evaluations, logs, checkpoints")
    eval_every: int | None = option(None, "steps between evaluations; by default a tenth of all")
    eval_tokens: int = option(65536, "validation tokens of an evaluation during training")
    final_eval_tokens: int | None = option(None, "of the last evaluation; by default all")
    probe_tokens: int = option(512, "tokens whose attention each evaluation looks at, 0: none")
    save_every: int | None = option(None, "steps between checkpoints; by default a tenth of all")
    keep_checkpoints: int = option(2, "how many of the latest checkpoints stay")
    async_save: bool = option(False, "write checkpoints in the background, while training goes on")
    tensorboard: bool = option(True, "write event files for TensorBoard")
    wandb: bool = option(False, "log to Weights & Biases")

    def __post_init__(self) -> None:
        check_values(self)
        if self.out is not None:
            self.out = str(user_path(self.out))

    def resolved(self) -> Self:
        """A copy in which every default that depends on another option is filled in, checked.

        Raises:
            InputError: an option is out of its range.
        """
        return self._filled()

    def _filled(self, **defaults: Any) -> Self:
        """A copy with every default that depends on another option, checked."""
        for name in ("steps", "out"):
            if (defaults.get(name) or getattr(self, name)) is None and not self.dry_run:
                raise InputError(f"{name} must be given: --{name}")
        steps = self.steps or defaults.get("steps") or 0
        tenth = max(1, steps // 10)
        defaults = {
            "warmup": min(tenth, 2000),
            "eval_every": tenth,
            "save_every": tenth,
            "dtype": default_dtype(),
            "workers": 0,
        } | defaults
        unset: dict[str, Any] = {
            name: value for name, value in defaults.items() if getattr(self, name) in (None, "auto")
        }
        options = dataclasses.replace(self, **unset)
        options._check()
        return options._with_whole_batches()

    def _with_whole_batches(self) -> Self:
        """A copy whose global batch is filled by whole batches of the devices there are."""
        devices, sharing = self.placing()
        if self.fsdp and devices == 1:
            raise InputError(
                "fsdp shards over several devices, and there is one; start them with torchrun"
            )
        if devices % sharing:
            raise InputError(f"context_parallel must divide the {devices} devices, got {sharing}")
        together = self.batch_size * (devices // sharing)
        size = together if self.global_batch_size is None else self.global_batch_size
        if size % together:
            raise InputError(
                f"global_batch_size must be a multiple of the {together} blocks that the devices take "
                f"at a time, got {size}; another --batch-size may fit"
            )
        return dataclasses.replace(self, global_batch_size=size)

    @property
    def accumulation(self) -> int:
        """Batches in a step, on each device, once resolved."""
        devices, sharing = self.placing()
        assert self.global_batch_size is not None
        return self.global_batch_size // (self.batch_size * (devices // sharing))

    def placing(self) -> tuple[int, int]:
        """How many there are, and how many share a sequence."""
        return world_size(), 1

    def sources(self) -> list[str]:
        """What it reads, by name; nothing where the model writes its own text."""
        return [] if self.data is None else [self.data]

    def _check(self) -> None:
        check_least(
            self, steps=1, batch_size=1, log_every=1, eval_every=1, save_every=1, eval_tokens=1,
            keep_checkpoints=1, context=2, warmup=0, seed=0, global_batch_size=1, workers=0,
            probe_tokens=0, final_eval_tokens=1,
        )  # fmt: skip
        if self.seed >= SEEDS:
            raise InputError(f"seed must be below {SEEDS:,}, got {self.seed}")
        for name in ("min_learning_rate", "start_learning_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.beta2 < 1:
            raise InputError(f"beta2 must be in [0, 1), got {self.beta2}")
        for name in ("learning_rate", "clip", "peak_flops"):
            value = getattr(self, name)
            # No clipping is a clip of infinity.
            if value is not None and not (value > 0 and (value < math.inf or name == "clip")):
                raise InputError(f"{name} must be a number greater than 0, got {value}")
        for name in ("weight_decay", "skip_spikes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a number from 0 on, got {getattr(self, name)}")
        if self.wandb and not installed("wandb"):
            raise InputError("wandb is not installed; pip install wandb, or leave out --wandb")


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # its entry in sys.modules says that it cannot be imported
        return False
