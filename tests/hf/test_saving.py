"""What is saved of a StableMask model is refused by who does not know it, and loaded as ever by who does."""

import json

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlavaForConditionalGeneration

from stablemask.data import train_tokenizer
from stablemask.hf import apply_stablemask, load_model

from ..models.tiny import tiny_model
from .families import Family

LLAMA = Family("Llama", "LlamaForCausalLM")
SETTINGS = {"gamma": 0.02, "horizon": None, "hold": 63}
BOTH = ("architectures", "attn_implementation")
IDS = torch.arange(3, 14)[None]


@pytest.fixture
def adapted():
    torch.manual_seed(1)
    return apply_stablemask(LLAMA.model_class(LLAMA.config()).eval(), gamma=0.02)


def marks(folder):
    content = json.loads((folder / "config.json").read_text())
    return tuple(content.get(key) for key in BOTH)


MARKED = (["StableMaskLlamaForCausalLM"], "stablemask")
PLAIN = (["LlamaForCausalLM"], None)


def test_another_engine_finds_a_name_that_it_does_not_know(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    assert marks(tmp_path) == MARKED
    # vLLM takes for its Transformers backend whatever has this name in Transformers.
    assert not hasattr(transformers, MARKED[0][0])
    for _ in range(2):  # written again by whoever has read it, weights or not
        config = AutoConfig.from_pretrained(tmp_path)
        assert config.architectures == PLAIN[0]
        assert config._attn_implementation is None
        config.save_pretrained(tmp_path)
        assert marks(tmp_path) == MARKED
    AutoModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "base")
    assert marks(tmp_path / "base") == (["StableMaskLlamaModel"], "stablemask")


def test_softmax_and_our_own_decoder_are_saved_as_ever(adapted, tmp_path):
    LLAMA.model_class(LLAMA.config()).save_pretrained(tmp_path / "plain")
    assert marks(tmp_path / "plain") == PLAIN
    tiny_model().save_pretrained(tmp_path / "ours")
    assert marks(tmp_path / "ours") == (["StableMaskForCausalLM"], None)
    assert AutoConfig.from_pretrained(tmp_path / "ours").architectures == ["StableMaskForCausalLM"]
    adapted.save_pretrained(tmp_path / "adapted")
    back = AutoConfig.from_pretrained(tmp_path / "adapted")
    back.stablemask = None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "adapted", config=back)
    assert model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path / "back")
    assert marks(tmp_path / "back") == PLAIN


def test_a_checkpoint_without_the_marks_is_read(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["architectures"] = PLAIN[0]
    del content["attn_implementation"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model(IDS).logits.equal(adapted(IDS).logits)
    content["attn_implementation"] = "eager"  # by hand: the guard's business, not ours
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="'eager' would not run it"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_settings_of_a_part_mark_the_whole(tmp_path):
    config = LlavaForConditionalGeneration.config_class(
        text_config=LLAMA.config(stablemask=SETTINGS).to_dict(),
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
            "projection_dim": 32,
        },
        image_token_index=60,
    )
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(tmp_path)
    assert marks(tmp_path) == (["StableMaskLlavaForConditionalGeneration"], "stablemask")
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert again.config.architectures == ["LlavaForConditionalGeneration"]
    assert again.config.vision_config._attn_implementation == "sdpa"
    assert again.config.text_config._attn_implementation == "stablemask"


def of_pipeline(folder):
    return transformers.pipeline("text-generation", str(folder)).model


def of_transformers_serve(folder):
    name = AutoConfig.from_pretrained(folder).architectures[0]
    return getattr(transformers, name).from_pretrained(folder)


def of_peft(folder):
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(folder)
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(folder / "adapter")
    return AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").get_base_model()


def of_lm_eval(folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(str(folder), device="cpu", dtype="float32").model


@pytest.mark.parametrize(
    "load", [of_pipeline, of_transformers_serve, of_peft, of_lm_eval, load_model]
)
def test_whoever_imports_us_loads_it_as_ever(load, adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    train_tokenizer(["the quick brown fox"], 260).save_pretrained(tmp_path)
    model = load(tmp_path)
    assert model.config.stablemask == adapted.config.stablemask
    torch.testing.assert_close(model(IDS).logits, adapted(IDS).logits)
