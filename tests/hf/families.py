"""Families of Transformers models, one tiny model each, held against the definition.

``python -m tests.hf.families`` writes what came out to docs/families.md.
"""

import copy
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import stablemask.hf  # noqa: F401

from .dense import densely

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
OLDEST = "5.16"  # Transformers that we support
LENGTH = 11
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PSEUDO = (
    {"gamma": [0.3, 0.1, 0.05, 0.2]},
    {
        "gamma": 0.05,
        "horizon": 30,
        "start": 1,
        "shift": [[0.5, -1.0, 2.0, 0.0], [1.5, -0.5, 0.25, -3.0]],
    },
)


@dataclass(frozen=True, eq=False)
class Family:
    """A family, how to make its tiny model, and what a reader should know of it."""

    name: str
    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    window: bool = False
    notes: str = ""
    since: str = (
        ""  # the first Transformers in which it works, where older ones that we support refuse it
    )

    @property
    def model_class(self) -> Any:
        return getattr(transformers, self.model)

    def config(self, **more: Any) -> Any:
        config = self.model_class.config_class(**(SIZES | self.settings | more))
        # The grouped matrix product of the experts takes no float64.
        config._experts_implementation = "eager"
        return config


WINDOW = {"sliding_window": 5}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
MIXED = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
ALIBI = (
    "ALiBi: pretrain our own decoder with `--position alibi`, "
    "which runs ALiBi and StableMask in one kernel"
)
NO_POSITIONS = "its layers are not told positions, which are counted from the mask"

FAMILIES = [
    Family("Llama", "LlamaForCausalLM"),
    Family("Qwen2", "Qwen2ForCausalLM"),
    Family("Qwen2, sliding", "Qwen2ForCausalLM", MIXED | {"use_sliding_window": True}, True),
    Family("Qwen3", "Qwen3ForCausalLM", {"head_dim": 8}),
    Family("Mistral", "MistralForCausalLM", WINDOW, True),
    Family("Mixtral", "MixtralForCausalLM", WINDOW | EXPERTS, True),
    Family(
        "Gemma 2",
        "Gemma2ForCausalLM",
        MIXED | {"head_dim": 8},
        True,
        "as published",
    ),
    Family(
        "Gemma 2, uncapped",
        "Gemma2ForCausalLM",
        MIXED | {"head_dim": 8, "attn_logit_softcapping": None},
        True,
        "`attn_logit_softcapping=None`, with the weights trained so",
    ),
    Family(
        "Gemma 3",
        "Gemma3ForCausalLM",
        MIXED | {"head_dim": 8},
        True,
        "text; the tokens of a picture see each other, which is refused when it comes",
    ),
    Family("Phi-3", "Phi3ForCausalLM", WINDOW, True),
    Family("GPT-NeoX (Pythia)", "GPTNeoXForCausalLM"),
    Family("GPT-2", "GPT2LMHeadModel", {}),
    Family("OPT", "OPTForCausalLM", {"word_embed_proj_dim": 32, "ffn_dim": 48}),
    Family("OLMo 2", "Olmo2ForCausalLM"),
    Family("OLMo 3", "Olmo3ForCausalLM", MIXED, True),
    Family("Granite", "GraniteForCausalLM"),
    Family(
        "SmolLM3",
        "SmolLM3ForCausalLM",
        {"no_rope_layers": [1, 0]},
        notes="some layers without positions of their own",
    ),
    Family("StableLM", "StableLmForCausalLM"),
    Family("StarCoder2", "Starcoder2ForCausalLM", WINDOW, True),
    Family("Cohere", "CohereForCausalLM"),
    Family("Cohere 2", "Cohere2ForCausalLM", MIXED, True),
    Family("GLM", "GlmForCausalLM", {"head_dim": 8}),
    Family("Phi-3.5-MoE", "PhimoeForCausalLM", WINDOW | EXPERTS, True),
    Family(
        "Qwen2-MoE",
        "Qwen2MoeForCausalLM",
        MIXED | EXPERTS | {"use_sliding_window": True, "moe_intermediate_size": 16},
        True,
    ),
    Family(
        "DeepSeek-V3",
        "DeepseekV3ForCausalLM",
        EXPERTS
        | {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
        },
        notes="keys and values of different widths",
    ),
    Family(
        "gpt-oss",
        "GptOssForCausalLM",
        MIXED | EXPERTS | {"head_dim": 8},
        True,
        "its learned sinks are kept; `config.stablemask` adds the pseudo mass to them",
    ),
    Family(
        "Granite with sinks",
        "GraniteSWAForCausalLM",
        MIXED,
        True,
        "as gpt-oss",
    ),
    Family("GPT-BigCode (StarCoder)", "GPTBigCodeForCausalLM", notes=NO_POSITIONS),
    Family("Persimmon", "PersimmonForCausalLM", notes=NO_POSITIONS),
    Family("Bloom", "BloomForCausalLM", notes=ALIBI),
    Family("MPT", "MptForCausalLM", {"d_model": 32, "n_heads": 4, "n_layers": 2}, notes=ALIBI),
    Family("Falcon", "FalconForCausalLM"),
    Family("Falcon, ALiBi", "FalconForCausalLM", {"alibi": True}, notes=ALIBI),
    Family("GPT-J", "GPTJForCausalLM", {"rotary_dim": 4}, since="5.24"),
    Family("CodeGen", "CodeGenForCausalLM", {"rotary_dim": 4}, since="5.24"),
    Family("XGLM", "XGLMForCausalLM", {"d_model": 32, "ffn_dim": 48}),
    Family("GPT-Neo", "GPTNeoForCausalLM", {"attention_types": [[["global", "local"], 1]]}),
    Family("BERT as a decoder", "BertLMHeadModel", {"is_decoder": True}, notes=NO_POSITIONS),
    Family("BERT", "BertLMHeadModel"),
    Family("Mamba", "MambaForCausalLM"),
]


@dataclass(frozen=True)
class Outcome:
    """What became of a family: refused with a message, or distances from the definition.

    Distances are between float64 models, relative to the largest value of the definition.
    """

    refusal: str | None = None
    attention: float = 0.0  # the output of the first layer's attention
    logits: float = 0.0
    gradients: float = 0.0
    plain: float = torch.inf  # how far the logits without pseudo columns are

    @property
    def works(self) -> bool:
        return self.refusal is None


@functools.cache
def outcome(family: Family) -> Outcome:
    """Run a family with each of the settings, on left-padded and on whole texts."""
    torch.manual_seed(0)
    try:
        outcomes = [_compare(family, PSEUDO[0], pad=3), _compare(family, PSEUDO[1], pad=0)]
    except ValueError as error:
        return Outcome(refusal=str(error))
    return Outcome(
        attention=max(o.attention for o in outcomes),
        logits=max(o.logits for o in outcomes),
        gradients=max(o.gradients for o in outcomes),
        plain=min(o.plain for o in outcomes),
    )


def _compare(family: Family, settings: dict, pad: int) -> Outcome:
    model = family.model_class(family.config(stablemask=copy.deepcopy(settings))).double().eval()
    exact = family.model_class._from_config(family.config(), attn_implementation="eager")
    exact = exact.double().eval()
    exact.load_state_dict(model.state_dict())

    real = torch.ones(2, LENGTH, dtype=torch.long)
    real[1, :pad] = 0
    positions = (real.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": torch.randint(3, 61, (2, LENGTH))}
    if pad:
        inputs |= {"attention_mask": real, "position_ids": positions}
    weights = torch.randn(int(real.sum()), 61, dtype=torch.float64)

    ours = _run(model, inputs, real.bool(), weights)
    with densely(exact, positions, settings):
        truth = _run(exact, inputs, real.bool(), weights)
    with densely(exact, positions, None), torch.no_grad():
        plain = exact(**inputs, use_cache=False).logits[real.bool()]
    return Outcome(
        attention=_distance(ours[0], truth[0]),
        logits=_distance(ours[1], truth[1]),
        gradients=max(
            _distance(ours[2][name], gradient, scale=_largest(truth[2]))
            for name, gradient in truth[2].items()
        ),
        plain=_distance(plain, truth[1]),
    )


def _run(model: Any, inputs: dict, real: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, dict]:
    """First attention output and logits at real tokens, and the gradient of every parameter."""
    outputs: list[Tensor] = []
    first = next(
        layer
        for layer in model.modules()
        if getattr(layer, "layer_idx", None) == 0 and "Attention" in type(layer).__name__
    )
    hook = first.register_forward_hook(lambda *call: outputs.append(call[-1][0][real]))
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits[real]
    hook.remove()
    (logits * weights).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return outputs[0].detach(), logits.detach(), gradients


def _largest(tensors: dict[str, Tensor]) -> float:
    return max(float(tensor.abs().max()) for tensor in tensors.values())


def _distance(ours: Tensor, truth: Tensor, scale: float | None = None) -> float:
    scale = float(truth.abs().max()) if scale is None else scale
    return float((ours - truth).abs().max()) / scale


def page() -> str:
    """docs/families.md, from what the models did."""
    rows = []
    for family in FAMILIES:
        found = outcome(family)
        if found.works:
            notes, verdict = family.notes, "works"
        else:
            reason = (found.refusal or "").partition(": ")[2] or found.refusal
            notes = "; ".join(filter(None, (reason, family.notes)))
            verdict = "refused"
        window = "yes" if family.window else ""
        since = (family.since or OLDEST) if found.works else ""
        cells = family.name, f"`{family.model}`", verdict, since, window, notes
        rows.append(f"| {' | '.join(cells)} |")
    return PREFACE + "\n".join(rows) + "\n"


PREFACE = """\
# Which Transformers models run StableMask

This page lists the families of Transformers that were tried with StableMask. `python -m tests.hf.families` writes it, and
`tests/hf/test_families.py` checks it. A family that is not named works if its layers call Transformers' attention interface
and are told `position_ids`. Those that choose or compress their keys (DeepSeek V3.2 and V4, GLM-5, MiniMax M3) are refused
when they are run.

- *Works*: a random model of two layers in float64 equals its own eager attention with the pseudo columns of
  [the method](method.md) written out in it, in logits and in the gradient of every parameter. It is tried with two
  [settings](transformers.md#settings): one gamma a head, an infinite horizon and a text padded on the left; and one gamma, a
  finite horizon, a `start` and a `shift` of each layer and head.
- *Refused*: a ValueError gives the reason when the model is made or, for soft-capping, when it is run. Nothing else runs in
  its stead.
- *From*: the first Transformers, of those we support, in which it works. Older ones refuse it.

| family | class | StableMask | from | sliding window | notes |
|---|---|---|---|---|---|
"""


if __name__ == "__main__":
    PAGE.write_text(page())
