"""Options of a pretraining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import InputError
from ..models.presets import ATTENTION_KINDS, POSITION_ENCODINGS, PRESETS
from ..options import changed, check_least, option
from .machine import world_size
from .options import TrainingOptions

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..models.configuration import StableMaskConfig


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
