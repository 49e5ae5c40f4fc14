"""Every family against the definition written out in its own eager attention."""

import pytest
import torch
import transformers
from packaging.version import Version

from stablemask.hf import apply_stablemask
from stablemask.hf.attention import stablemask_attention_forward
from tests import marks

from .families import FAMILIES, OLDEST, PAGE, PSEUDO, SIZES, outcome, page

EPS = torch.finfo(torch.float32).eps

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family.since], ids=lambda family: family.name
)
def test_a_family_works_from_the_version_that_the_page_names(family):
    assert outcome(family).works == (Version(family.since) <= marks.TRANSFORMERS)


def test_the_oldest_version_that_the_page_names_is_the_floor():
    assert f'"transformers>={OLDEST}",' in (PAGE.parents[1] / "pyproject.toml").read_text()


@families
def test_logits_and_gradients_equal_the_definition_or_the_family_is_refused(family):
    found = outcome(family)
    if found.works:
        # The sink logits are float32, and so are the norms and routers between the layers.
        assert found.attention < EPS
        assert max(found.logits, found.gradients) < 64 * EPS
        assert found.plain > 0.01
    else:
        assert "\n" not in found.refusal


@families
def test_the_name_alone_and_a_built_model_meet_the_same_answer(family):
    input_ids = torch.randint(3, 61, (1, 6))

    def by_name():
        return family.model_class._from_config(family.config(), attn_implementation="stablemask")

    def by_call():
        model = family.model_class(family.config())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.1)
        return apply_stablemask(model, **PSEUDO[0])

    for build in (by_name, by_call):
        if outcome(family).works:
            model = build().eval()
            assert model.config._attn_implementation == "stablemask"
            assert model(input_ids).logits.isfinite().all()
        else:
            with pytest.raises(ValueError, match=r"StableMask (cannot run in|needs one)"):
                build()(input_ids)


def test_a_refused_model_is_left_as_it_was():
    family = next(family for family in FAMILIES if family.model == "BloomForCausalLM")
    model = family.model_class(family.config())
    name = model.config._attn_implementation
    with pytest.raises(ValueError, match="do not call Transformers' attention interface"):
        apply_stablemask(model)
    assert getattr(model.config, "stablemask", None) is None
    assert model.config._attn_implementation == name
    model(torch.randint(3, 61, (1, 6)))


@pytest.mark.parametrize("term", ["position_bias", "softcap"])
def test_terms_in_the_scores_that_no_kernel_takes_are_refused(term):
    layer = FAMILIES[0].model_class(FAMILIES[0].config()).model.layers[0].self_attn
    states = torch.randn(1, 4, 3, 8)
    with pytest.raises(ValueError, match=rf"cannot run in LlamaAttention: .* \({term}\)$"):
        stablemask_attention_forward(layer, states, states, states, None, **{term: torch.ones(3)})


@marks.transformers_since("5.24")
@pytest.mark.parametrize(
    ("name", "layer_type", "part"),
    [
        ("DeepseekV32", None, "indexer"),
        ("MiniMaxM3VL", "minimax_m3_sparse", "indexer"),
        ("DeepseekV4", "compressed_sparse_attention", "compressor"),
    ],
)
@pytest.mark.parametrize("way", ["name", "settings", "sdpa"])
def test_attention_to_other_keys_than_the_past_is_refused(name, layer_type, part, way):
    """By its name alone too: DeepSeek V4 has learned sinks, which need no settings."""
    model_class = getattr(transformers, f"{name}ForCausalLM")
    sizes = {
        "num_key_value_heads": 4, "head_dim": 16, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "index_topk": 3, "index_head_dim": 16, "index_n_heads": 2,
    }  # fmt: skip
    if layer_type is not None:
        sizes["layer_types"] = [layer_type] * 2
    model = model_class._from_config(model_class.config_class(**SIZES | sizes)).eval()
    if way == "name":
        model.set_attn_implementation("stablemask")
    else:
        apply_stablemask(model, gamma=0.1)
    if way == "sdpa" and name != "DeepseekV4":  # which does not take that
        model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=rf"cannot run in {name}Attention: .* \({part}\)$"):
        model(torch.randint(3, 61, (1, 12)))


def test_settings_in_the_wrong_configuration_are_refused():
    """An encoder-decoder's decoder has no configuration of its own to hold them."""
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 32, "vocab_size": 61}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = BartConfig(**sizes, **heads, encoder_ffn_dim=32, decoder_ffn_dim=32)
    model = BartForConditionalGeneration(config)
    with pytest.raises(ValueError, match="no causal attention that reads this configuration"):
        apply_stablemask(model)


@marks.transformers_since(max(family.since for family in FAMILIES))
def test_the_page_says_what_was_found():
    assert PAGE.read_text() == page(), "run python -m tests.hf.families"
