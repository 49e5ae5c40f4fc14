"""What a model is: its sizes, how it knows positions, and what sink its attention has."""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ..errors import InputError
from .cache import CACHE_NAMES
from .presets import (
    ATTENTION_KINDS,
    FRONT_TOKENS,
    NAMED_MASSES,
    POSITION_ENCODINGS,
    PRESETS,
)
from .settings import complete_settings, is_number, named_mass, require_positive_int

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
# What is checked, in construction and whenever it is written afterwards.
_CHECKED = (
    *_SIZES,
    "head_dim",
    "position_encoding",
    "attention",
    "stablemask",
    "rope_parameters",
    "rms_norm_eps",
    "initializer_range",
    "attention_dropout",
)
# What Transformers' caches and masks would read, and our layers do not.
_UNREAD = ("sliding_window", "layer_types", "attention_chunk_size")
_NAMES_OF_ROPE = ("rope_theta", "rope_scaling")  # as Transformers took them before rope_parameters


class StableMaskConfig(PreTrainedConfig):
    """Configuration of :class:`~stablemask.models.StableMaskModel`.

    Args:
        vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: sizes.
        num_key_value_heads: a divisor of ``num_attention_heads``, which is the default.
        head_dim: width of a head; default ``hidden_size // num_attention_heads``.
        max_position_embeddings: the training context. Only ``learned`` positions end there.
        position_encoding: ``rope``, ``alibi``, ``nope`` (none), ``learned`` or ``sinusoidal``.
        attention: which sink logit a row has. ``stablemask``: the pseudo mass of its position;
            ``softmax``: none; ``softmax1``: 0 (softmax-off-by-one); ``learned-sink``: one trained
            number per head and layer; ``key-sink``: the score of a trained key without a value, one per
            head and layer. ``learned-token`` and ``fixed-token`` have one token more in front of every
            sequence, which the caller does not see, its embedding trained or the same number everywhere.
            ``head-gate``: none, and the output of each head times the sigmoid of a linear map of the
            layer's input. ``stablemask-paper`` and ``stablemask-zero`` are names of settings,
            and become ``stablemask`` with them: the published form (head slopes, the context as its
            horizon, one pseudo column behind it), and pseudo scores of zero within the context.
        stablemask: ``{"gamma": ..., "horizon": ...}`` and more, with ``attention="stablemask"`` only:
            see :func:`~stablemask.models.settings.complete_settings`.
        rope_parameters: ``{"rope_type": "default", "rope_theta": 10000.0}``, with ``rope`` only.
        rms_norm_eps, initializer_range, attention_dropout, tie_word_embeddings, use_cache: as in
            Transformers' Llama.

    Whatever way a field is written, ``from_pretrained(path, field=...)`` and ``config.field = ...`` included,
    it is checked against the others and completed by its defaults. Settings go with the choice that reads
    them: with another ``attention`` ``stablemask`` becomes None, as does ``rope_parameters`` with another
    ``position_encoding``.

    Raises:
        ValueError: an argument is out of its range; the message names it, its value and its range.
    """

    # No field, and not in `__dict__`, which is saved.
    __slots__ = ("_complete",)

    model_type: ClassVar[str] = "stablemask"
    keys_to_ignore_at_inference: ClassVar[list[str]] = list(CACHE_NAMES)
    # Sinks and gates are not in it: whole on every rank, they are sliced as their heads are.
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 50304
    hidden_size: int = 512
    intermediate_size: int = 1376
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 512
    position_encoding: str = "rope"
    attention: str = "stablemask"
    stablemask: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in _UNREAD:
            _refuse_unread(name, kwargs.get(name))
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self._check_sizes()
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._check_choices()
        self.stablemask = self._complete_stablemask()
        asked_for_rope = self.rope_parameters is not None or not kwargs.keys().isdisjoint(
            _NAMES_OF_ROPE
        )
        super().__post_init__(**kwargs)
        self._check_rope(asked_for_rope)
        self._complete = True

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        # Transformers writes what is overridden onto a finished configuration, one field after another.
        ours = (*_CHECKED, *_NAMES_OF_ROPE, *_UNREAD)
        changes = {name: kwargs.pop(name) for name in ours if name in kwargs}
        return super().from_dict(_changed(config_dict, changes), **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        _refuse_unread(name, value)
        checked = name in _CHECKED or name in _NAMES_OF_ROPE
        if not checked or not getattr(self, "_complete", False):
            super().__setattr__(name, value)
            return
        stored = {field: getattr(self, field) for field in _CHECKED}
        new = type(self)(**_changed(stored, {name: value}))
        for field in _CHECKED:
            if getattr(new, field) != stored[field]:
                super().__setattr__(field, getattr(new, field))

    @property
    def query_width(self) -> int:
        """Width of all query heads together."""
        assert self.head_dim is not None
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        """Width of all key heads together, and of all value heads."""
        assert self.head_dim is not None
        assert self.num_key_value_heads is not None
        return self.num_key_value_heads * self.head_dim

    def _check_sizes(self) -> None:
        for name in _SIZES:
            require_positive_int(name, getattr(self, name))
        if self.head_dim is not None:
            require_positive_int("head_dim", self.head_dim)
        elif self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads must divide hidden_size ({self.hidden_size}) where head_dim "
                f"is not given, got {self.num_attention_heads}"
            )
        assert self.num_key_value_heads is not None
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                "num_key_value_heads must divide num_attention_heads "
                f"({self.num_attention_heads}), got {self.num_key_value_heads}"
            )

    def _check_choices(self) -> None:
        for name, allowed in (
            ("position_encoding", POSITION_ENCODINGS),
            ("attention", ATTENTION_KINDS),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        if not 0.0 <= self.attention_dropout < 1.0:
            raise ValueError(f"attention_dropout must be in [0, 1), got {self.attention_dropout!r}")
        if self.attention in FRONT_TOKENS and self.attention_dropout:
            raise ValueError(
                f"attention_dropout must be 0 with attention={self.attention!r}, "
                f"got {self.attention_dropout!r}"
            )
        for name in ("rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not is_number(value) or value <= 0:
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if self.position_encoding == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(
                f"hidden_size must be even with sinusoidal positions, got {self.hidden_size}"
            )

    def _complete_stablemask(self) -> dict[str, Any] | None:
        """The ``stablemask`` settings with their defaults filled in; None for other attention."""
        if self.attention in NAMED_MASSES and self.stablemask is None:
            self.stablemask = named_mass(self.attention, self.max_position_embeddings)
            self.attention = "stablemask"
        if self.attention != "stablemask":
            if self.stablemask is not None:
                raise ValueError(
                    f"stablemask must be None with attention={self.attention!r}, which does not "
                    f"read it, got {self.stablemask!r}"
                )
            return None
        return complete_settings(
            self.stablemask,
            self.num_attention_heads,
            self.max_position_embeddings,
            self.num_hidden_layers,
            own_decoder=True,
        )

    def _check_rope(self, asked_for_rope: bool) -> None:
        if self.position_encoding != "rope":
            if asked_for_rope and self.rope_parameters:
                raise ValueError(
                    "rope_parameters must be None with position_encoding="
                    f"{self.position_encoding!r}, which does not read it, "
                    f"got {self.rope_parameters!r}"
                )
            self.rope_parameters = None
            return
        parameters = self.rope_parameters or {}
        if parameters.get("rope_type") != "default" or not parameters.keys() <= {
            "rope_type",
            "rope_theta",
        }:
            raise ValueError(
                "rope_parameters must hold rope_type 'default' and rope_theta only, "
                f"got {parameters!r}"
            )
        theta = parameters["rope_theta"]
        if not is_number(theta) or theta <= 0:
            raise ValueError(f"rope_theta must be a positive number, got {theta!r}")
        assert self.head_dim is not None
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even with rope positions, got {self.head_dim}")


def _refuse_unread(name: str, value: Any) -> None:
    if name in _UNREAD and value is not None:
        raise ValueError(
            f"{name} must be None: every layer attends to all of the past, got {value!r}"
        )


def _changed(stored: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Fields with some written anew, less the settings that their new choice does not read."""
    fields = stored | changes
    for choice, reader, settings in (
        ("attention", "stablemask", "stablemask"),
        ("position_encoding", "rope", "rope_parameters"),
    ):
        if changes.get(choice, reader) != reader and settings not in changes:
            fields[settings] = None
    if "rope_theta" in changes:
        rope = fields.get("rope_parameters") or {}
        fields["rope_parameters"] = rope | {"rope_theta": fields.pop("rope_theta")}
    return fields


def preset_config(name: str, **overrides: Any) -> StableMaskConfig:
    """The configuration of a preset, any field replaced by keyword.

    Raises:
        InputError: no preset has this name.
    """
    if name not in PRESETS:
        raise InputError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return StableMaskConfig(**{**PRESETS[name], **overrides})
