"""What a training run can be told, and the checks that need no data."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import InputError
from ..models.presets import ATTENTION_KINDS, POSITION_ENCODINGS, PRESETS
from ..options import changed, check_least, check_values, option
from ..reading import user_path
from ..shell import pip_install
from .machine import default_dtype, world_size

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..models.configuration import StableMaskConfig

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
# What the sink is taken out of a model with, where nothing else is given.
ADAPTING: dict[str, Any] = {"steps": 120, "context": 256, "batch_size": 4, "beta2": 0.99}
# Where no biases can stand for the prefix, there is more to learn.
WITHOUT_BIASES: dict[str, Any] = {"steps": 400, "learning_rate": 2e-4}
# Where they stand for its value alone, the key is left to learn; at the usual rate training leads away at first.
BIASES_OF_VALUES: dict[str, Any] = {"steps": 300, "learning_rate": 2e-5}


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
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise InputError(f"{name} must be greater than 0, got {getattr(self, name)}")
        for name in ("weight_decay", "skip_spikes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a number from 0 on, got {getattr(self, name)}")
        if self.wandb and not _installed("wandb"):
            raise InputError("wandb is not installed; pip install wandb, or leave out --wandb")


@dataclass(kw_only=True)
class PretrainOptions(TrainingOptions):
    """Train a language model from scratch.

    The defaults suit the tiny preset.
    """

    command: ClassVar[str] = "pretrain"

    data: str = option(
        "builtin",
        "builtin[:packages], a file or folder of text, or hub:OWNER/NAME[:CONFIG]",
        group="data",
    )
    preset: str = option("tiny", "size of the model", choices=tuple(PRESETS), group="model")
    attention: str = option("stablemask", "kind of attention", choices=ATTENTION_KINDS)
    position: str = option("rope", "position encoding", choices=POSITION_ENCODINGS)
    gamma: float | Literal["slopes", "learned"] | None = option(
        None, "decay of the pseudo scores: a number, slopes, or learned; by default 1 / context"
    )
    horizon: int | None = option(None, "columns of the pseudo mask; by default infinitely many")
    hold: int | Literal["never"] | None = option(
        None, "last position at which the mass falls, or never; by default context - 1"
    )
    shift: float | None = option(None, "added to the log of the mass")
    floor: float | None = option(None, "a constant added to the mass of every row")
    layers: list[int] | None = option(None, "the layers that have a mass; by default all")
    tokenizer: str | None = option(None, "existing one; by default one is trained", group="tokens")
    vocab_size: int | None = option(None, "vocabulary; by default the preset's")
    mixture: list[str] = option([], "several sources in place of --data, each SOURCE=WEIGHT")
    streaming: bool = option(False, "read and tokenize while training, and store no tokens")
    shuffle_buffer: int = option(10_000, "with --streaming, documents shuffled at a time")
    context_parallel: int = option(1, "devices that share a sequence", group="devices")
    devices: int | None = option(None, "with --dry-run, how many; by default those there are")

    def resolved(self) -> Self:
        preset = PRESETS[self.preset]
        return self._filled(
            vocab_size=preset["vocab_size"],
            context=preset["max_position_embeddings"],
            workers=int(self.streaming),
        )

    def placing(self) -> tuple[int, int]:
        there_are = (self.devices if self.dry_run else None) or world_size()
        return there_are, self.context_parallel

    def sources(self) -> list[str]:
        from ..data.mixture import parse_mixture

        return list(parse_mixture(self.mixture)) if self.mixture else [self.data]

    def _check(self) -> None:
        from ..data.mixture import parse_mixture

        super()._check()
        self.model_config()
        if self.mixture and self.data != "builtin":
            raise InputError("give data or a mixture, not both")
        if self.mixture:
            parse_mixture(self.mixture)
        if self.streaming and self.tokenizer is None:
            raise InputError("streaming needs a tokenizer, for it trains none: --tokenizer")
        for switch, name in (("streaming", "shuffle_buffer"), ("dry_run", "devices")):
            if not getattr(self, switch) and changed(self, [name]):
                raise InputError(f"{name} goes with --{switch.replace('_', '-')}")
        check_least(self, shuffle_buffer=1, context_parallel=1, devices=1)
        assert self.context is not None
        if self.context_parallel > 1 and self.context % (2 * self.context_parallel):
            raise InputError(
                f"context must be a multiple of twice context_parallel ({2 * self.context_parallel}), "
                f"got {self.context}"
            )

    def model_config(self, **overrides: Any) -> StableMaskConfig:
        """The model these options describe; ``overrides`` are fields of its configuration."""
        from ..models.configuration import preset_config
        from ..models.settings import given_settings

        names = ("gamma", "horizon", "hold", "shift", "floor", "layers")
        given = given_settings(**{name: getattr(self, name) for name in names})
        if given and self.attention != "stablemask":
            raise InputError(
                f"{' and '.join(given)} goes with attention stablemask, not {self.attention}"
            )
        fields = {
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.context,
            "attention": self.attention,
            "position_encoding": self.position,
            "stablemask": given or None,
        }
        try:
            return preset_config(self.preset, **{**fields, **overrides})
        except ValueError as error:
            raise InputError(str(error)) from error


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
        "of 2e-5, or with --lora in 400 at 2e-4, evaluated and saved each quarter",
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
        from .base_model import can_have_biases, context_of, normalises_keys

        defaults: dict[str, Any] = {
            "batch_size": 8, "learning_rate": 5e-5, "beta2": 0.999, "dtype": default_dtype(large=True),
        }  # fmt: skip
        if self.adapt:
            defaults |= ADAPTING
            if self.lora or not can_have_biases(self.model):
                defaults |= WITHOUT_BIASES
            elif normalises_keys(self.model):
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
        if self.lora and not _installed("peft"):
            raise InputError(f"lora needs PEFT, which is not installed: {pip_install('train')}")


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # its entry in sys.modules says that it cannot be imported
        return False
