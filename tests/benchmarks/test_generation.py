"""Generating with and without StableMask is timed on the same weights, which come back unchanged."""

import json

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import generation
from benchmarks.commands import GenerationOptions, time_generation
from stablemask.errors import InputError
from stablemask.hf import apply_stablemask


def llama():
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 16}
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes))


def test_the_model_comes_back_as_it_was(monkeypatch):
    monkeypatch.setattr(generation, "NEW_TOKENS", 2)
    model = llama()
    (sdpa, ours) = generation.measure_generation(model, quick=True)
    assert (sdpa["row"], sdpa["of_sdpa"], ours["row"]) == ("sdpa", 1.0, "stablemask")
    assert ours["tokens_per_second"] > 0
    assert ours["prompt_ms"] > 0
    assert sdpa["prompt_of_sdpa"] == 1.0
    assert model.config._attn_implementation == "sdpa"
    assert model.config.stablemask is None
    with pytest.raises(InputError, match="give a model that runs stock SDPA"):
        generation.measure_generation(apply_stablemask(model), quick=True)


def test_the_command_times_a_folder_and_saves_what_it_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generation, "NEW_TOKENS", 2)
    llama().save_pretrained(tmp_path / "model")
    folder = tmp_path / "results"
    time_generation(
        GenerationOptions(
            model=str(tmp_path / "model"), dtypes=["float32"], quick=True, save=str(folder)
        )
    )
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    (saved,) = folder.glob("generation-*.json")
    assert json.loads(saved.read_text()) == printed
    assert [record["row"] for record in printed["generation"]] == ["sdpa", "stablemask"]
