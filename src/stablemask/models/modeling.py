"""The decoder: pre-norm RMSNorm, SwiGLU, grouped-query heads, and attention with a sink logit.

Read it from the bottom: ``StableMaskForCausalLM`` holds a ``StableMaskModel``, whose forward works
out once what all layers share (positions, mask, rotary angles, sink logits) and hands it down to
those in ``layers.py``.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.masking_utils import AttentionMaskInterface, create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .cache import CACHE, CACHE_NAMES, one_cache
from .configuration import StableMaskConfig
from .kept import rates_on_device
from .layers import StableMaskAttention, StableMaskDecoderLayer
from .loss import chunked_causal_lm_loss
from .masks import attention_mask, can_be_read, merged_documents, report
from .norm import RMSNorm
from .positions import (
    alibi_mask,
    check_length,
    check_table,
    position_sink_logits,
    rotary_angles,
    sinusoidal_encoding,
)
from .presets import FRONT_TOKENS, SINK_LOGITS_ALONE
from .settings import LEARNED

ATTN_IMPLEMENTATION = "stablemask"
# `create_causal_mask` looks masks up by the name of the attention.
AttentionMaskInterface.register(ATTN_IMPLEMENTATION, attention_mask)


class StableMaskPreTrainedModel(PreTrainedModel):
    """What the base model and its heads share: initialisation, and the one attention they run."""

    config: StableMaskConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["StableMaskDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = list(CACHE_NAMES)  # noqa: RUF012
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": StableMaskDecoderLayer}  # noqa: RUF012

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, StableMaskAttention):
            # As gpt-oss does: close to softmax-off-by-one, the heads told apart from the start.
            for sinks in (module.sinks, module.sink_keys):
                if sinks is not None:
                    init.normal_(sinks, mean=0.0, std=self.config.initializer_range)
        if isinstance(module, StableMaskModel) and module.front_token is not None:
            init.normal_(module.front_token, mean=0.0, std=self.config.initializer_range)
        if isinstance(module, StableMaskModel) and module.log_gamma is not None:
            init.constant_(module.log_gamma, -math.log(self.config.max_position_embeddings))

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # so that `set_attn_implementation` asks the check below instead of warning

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        # "sdpa" is what scripts say for any model, and means the default.
        if attn_implementation not in (None, ATTN_IMPLEMENTATION, "sdpa"):
            raise ValueError(
                f"attn_implementation must be {ATTN_IMPLEMENTATION!r}, 'sdpa' or not given: "
                f"{type(self).__name__} runs its own attention, which config.attention chooses, "
                f"got {attn_implementation!r}"
            )
        return ATTN_IMPLEMENTATION


class StableMaskModel(StableMaskPreTrainedModel):
    """The decoder without its head: token ids to hidden states.

    Attributes:
        sequence_group: the processes that share sequences with this one. Each then gives its part of
            them, as :func:`stablemask.distributed.shard_sequence` cuts it, with its ``position_ids``
            and without a mask or a cache.
    """

    sequence_group: ProcessGroup | None = None

    def __init__(self, config: StableMaskConfig):
        super().__init__(config)
        # No padding_idx: where padding and end share an id, the end token would never be trained.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.position_encoding == "learned":
            self.embed_positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.layers = nn.ModuleList(
            StableMaskDecoderLayer(config, layer_idx)
            for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if (config.stablemask or {}).get("gamma") == LEARNED:
            # Here, not in the layers: a sharded model gathers it once for all of them.
            self.log_gamma = nn.Parameter(
                torch.empty(config.num_hidden_layers, config.num_attention_heads)
            )
        else:
            self.register_parameter("log_gamma", None)
        if config.attention == "learned-token":
            self.front_token = nn.Parameter(torch.empty(config.hidden_size))
        else:
            self.register_parameter("front_token", None)
        self.gradient_checkpointing = False
        self._built_for = config.attention
        self.post_init()

    def check_parts(self, attention: str, stablemask: dict[str, Any] | None) -> None:
        """Raise ValueError unless the model has the parameters that these settings read, and no others."""
        built_for = self._built_for
        allowed = SINK_LOGITS_ALONE if built_for in SINK_LOGITS_ALONE else (built_for,)
        if attention not in allowed:
            raise ValueError(
                f"attention must be {' or '.join(allowed)} in a model that was built for {built_for}, got "
                f"{attention!r}: another kind has other parameters"
            )
        learned = (stablemask or {}).get("gamma") == LEARNED
        if learned != (self.log_gamma is not None):
            raise ValueError(
                f"stablemask['gamma'] must {'not ' * learned}be {LEARNED!r}, for the model was built "
                f"{'without' if learned else 'with'} decay rates that are trained"
            )

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        *,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the decoder.

        Args:
            input_ids: (batch, length); or ``inputs_embeds``, (batch, length, hidden).
            attention_mask: (batch, past + length), 0 at padding; or ready for attention, bool or
                additive, (batch, 1 or heads, length, past + length).
            position_ids: (batch or 1, length), each token's absolute position in its own sequence.
                Default: counted from ``attention_mask`` (2-D), else from the cache. Positions that
                restart, with neither mask nor cache, mark packed documents, kept apart; with one there
                is a warning.
            cache: a DynamicCache, a StaticCache, or None; ``past_key_values`` is its older name.
            use_cache: make a DynamicCache where none is given; default ``config.use_cache``.
            kwargs: ``output_hidden_states``, whose first row is a front token where there is one. Others
                are dropped, but for caches, masks and positions under names that nothing here reads.

        Raises:
            ValueError: the ``learned`` position table is too short, inputs do not fit together, or a
                keyword that would matter is not known.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if kwargs.get("output_attentions"):
            raise ValueError(
                "output_attentions must be False: the fast kernels store no attention map"
            )
        _refuse_unknown(kwargs, position_ids)
        cache = one_cache(cache, past_key_values)
        config = self.config
        self.check_parts(config.attention, config.stablemask)
        given: Tensor = input_ids if inputs_embeds is None else inputs_embeds  # type: ignore[assignment]
        past_length = 0 if cache is None else cache.get_seq_length()
        positions = self._positions(position_ids, attention_mask, past_length, given)
        if config.position_encoding == "learned":
            longest = past_length + given.shape[1] if position_ids is None else None
            check_table(positions, config.max_position_embeddings, longest)

        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        # With `position_ids` as given and no cache made yet, packed documents are recognised, and a
        # plain batch builds no mask under torch.compile.
        attn_mask: Any = None
        if self.sequence_group is None:
            attn_mask = create_causal_mask(
                config=config,
                inputs_embeds=hidden_states,
                attention_mask=attention_mask,
                **{CACHE: cache},
                position_ids=position_ids,
            )
            if position_ids is not None and position_ids.shape[1] > 1 and can_be_read(position_ids):
                report(self, merged_documents(position_ids, attn_mask))
        elif position_ids is None or attention_mask is not None or cache is not None:
            raise ValueError(
                "sequences shared by several processes need position_ids, and take no attention_mask and "
                "no cache"
            )
        if use_cache and cache is None and self.sequence_group is None:
            cache = DynamicCache(config=config)

        first: Any = self.layers[0]
        trained_shift = first.self_attn.stablemask_shift is not None
        sink_logits = position_sink_logits(config, positions, self.log_gamma, trained_shift)
        has_front = config.attention in FRONT_TOKENS
        rotary = alibi_slopes = None
        if config.position_encoding == "rope":
            # A front token stands one before the first.
            places = F.pad(positions, (1, 0), value=-1) if has_front else positions
            rotary = rotary_angles(places, config.head_dim, config.rope_parameters["rope_theta"])  # type: ignore[arg-type,index]
        elif config.position_encoding == "alibi":
            alibi_slopes = rates_on_device("slopes", config.num_attention_heads, positions)
            alibi_slopes = alibi_slopes.to(positions.device)
            if attn_mask is not None and getattr(cache, "is_compileable", False):
                # The last key of a static cache is not the last query's: count from the first.
                attn_mask = alibi_mask(alibi_slopes, attn_mask, past_length)
                alibi_slopes = None
        elif config.position_encoding == "learned":
            hidden_states = hidden_states + self.embed_positions(positions)
        elif config.position_encoding == "sinusoidal":
            # Vaswani et al., section 3.4: scale the embeddings to the size of the encoding.
            encoding = sinusoidal_encoding(positions, config.hidden_size)
            scale = config.hidden_size**0.5
            hidden_states = hidden_states * scale + encoding.to(hidden_states.dtype)

        if has_front:
            front: Tensor | None = self.front_token
            if front is None:  # as large as an embedding is at first
                front = hidden_states.new_full((config.hidden_size,), config.initializer_range)
            front = front.to(hidden_states.dtype).expand(hidden_states.shape[0], 1, -1)
            hidden_states = torch.cat((front, hidden_states), 1)
        for index, layer in enumerate(self.layers):
            hidden_states = layer(
                hidden_states,
                # By place: reentrant checkpointing gives no gradient to a keyword.
                sink_logits[index],
                rotary=rotary,
                attn_mask=attn_mask,
                alibi_slopes=alibi_slopes,
                **{CACHE: cache},  # so named, for gradient checkpointing takes it away
                sequence_group=self.sequence_group,
            )
        if has_front:
            hidden_states = hidden_states[:, 1:]
        filled: Any = {CACHE: cache}
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **filled)

    @staticmethod
    def _positions(
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        past_length: int | Tensor,
        given: Tensor,
    ) -> Tensor:
        """Absolute position of each token in its own sequence, (batch or 1, length)."""
        if position_ids is not None:
            return position_ids
        columns = past_length + torch.arange(given.shape[1], device=given.device)
        if attention_mask is None or attention_mask.dim() != 2:
            return columns[None]
        needed = past_length + given.shape[1]
        if isinstance(needed, int) and attention_mask.shape[1] < needed:
            raise ValueError(
                f"attention_mask must cover the cache and the input, {needed} tokens, "
                f"got shape {tuple(attention_mask.shape)}"
            )
        positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        return positions[:, columns]


class StableMaskForCausalLM(StableMaskPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head.

    With ``chunked_loss`` set, a forward pass with labels gives the loss and no logits, and holds only
    a chunk of them at a time (see ``loss.py``).
    """

    chunked_loss: bool = False

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: StableMaskConfig):
        super().__init__(config)
        self.model = StableMaskModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        *,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where ``labels`` are given; the rest as in :class:`StableMaskModel`.

        Args:
            labels: (batch, length), -100 where not counted; shifted here.
            logits_to_keep: how many of the last rows get logits (0: all), or which rows do.
            kwargs: ``num_items_in_batch`` makes the loss a sum over that count. ``shift_labels`` stands
                in place of ``labels``, shifted already: each part of a sequence that several processes
                share needs the next part's first token.
        """
        # Not in the signature, by which a Trainer would take it for one more label it must be given.
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        rows = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = outputs.last_hidden_state[:, rows]
        logits = loss = None
        if labels is None and shift_labels is None:
            logits = self.lm_head(hidden_states)
        elif self.chunked_loss:
            loss = chunked_causal_lm_loss(
                hidden_states, self.lm_head.weight, labels, shift_labels=shift_labels, **kwargs
            )
        else:
            logits = self.lm_head(hidden_states)
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.vocab_size,
                shift_labels=shift_labels,
                **kwargs,
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _validate_generated_length(
        self, generation_config: GenerationConfig, input_ids_length: int, *args: Any
    ) -> None:
        # Before any token is made; the last one needs no position.
        if self.config.position_encoding == "learned":
            check_length(generation_config.max_length - 1, self.config.max_position_embeddings)
        super()._validate_generated_length(  # type: ignore[misc]
            generation_config, input_ids_length, *args
        )


# Parts of the names of what would change the result if somebody read it.
_MATTERS = ("cache", "past", "mask", "position", "is_causal")
# Collators that pack give the limits of documents too, beside the positions that say the same.
_MATTERS_WITHOUT_POSITIONS = ("cu_seq", "seq_idx")


def _refuse_unknown(kwargs: dict[str, Any], position_ids: Tensor | None) -> None:
    """ValueError for a keyword that nothing reads, where the caller must think that something does."""
    matters = _MATTERS if position_ids is not None else _MATTERS + _MATTERS_WITHOUT_POSITIONS
    for name, value in kwargs.items():
        if value is None or (name == "is_causal" and value):
            continue
        if any(part in name for part in matters):
            raise ValueError(
                f"{name} is not read; what a token sees follows from attention_mask, position_ids and "
                "cache, and is causal"
            )
