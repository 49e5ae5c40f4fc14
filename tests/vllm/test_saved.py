"""vLLM and the name in ``architectures`` that an adapted model is saved with."""

import json

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from stablemask.hf import apply_stablemask
from tests import marks

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}


@marks.vllm
@pytest.mark.parametrize("way", ["auto", "transformers"])
def test_it_is_refused_by_that_name_and_taken_with_the_plug_in(way, tmp_path):
    from vllm.config import ModelConfig

    model = LlamaForCausalLM(LlamaConfig(**SIZES, num_attention_heads=2))
    apply_stablemask(model, gamma=0.1).save_pretrained(tmp_path)
    names = json.loads((tmp_path / "config.json").read_text())["architectures"]
    given = {"model": str(tmp_path), "skip_tokenizer_init": True, "model_impl": way}
    # As it stands in the file, which is what vLLM has of it without the plug-in.
    with pytest.raises(ValueError, match="StableMaskLlamaForCausalLM"):
        ModelConfig(**given, hf_overrides={"architectures": names})
    assert ModelConfig(**given).architectures == ["LlamaForCausalLM"]
