"""Adapters trained with StableMask, through every public way of saving, loading and merging them."""

import importlib
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from stablemask.cli import main as cli
from stablemask.data import train_tokenizer
from stablemask.hf import adapters, apply_stablemask, keep_shifts, load_model, train_shifts
from stablemask.hf.loading import load_config, merge_adapter

from ..models.tiny import random_ids, tiny_model

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SHIFT = [[-0.5, 1.25], [0.1, -2.0]]
SETTINGS = {"gamma": 0.05, "horizon": None, "hold": 63, "start": 1, "shift": SHIFT}
LORA = {"r": 3, "lora_alpha": 7, "task_type": "CAUSAL_LM"}
SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def make_base(folder, **sizes):
    config = LlamaConfig(
        **(SIZES | sizes), num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def randomise(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def base(tmp_path):
    return make_base(tmp_path / "base")


@pytest.fixture
def adapted(base):
    """A model trained with an adapter and StableMask, as one has it in Python."""
    model = apply_stablemask(load_model(str(base)), gamma=0.05, start=1, shift=SHIFT)
    return randomise(peft.get_peft_model(model, peft.LoraConfig(**LORA)))


@pytest.fixture
def adapter(adapted, tmp_path):
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def onto_the_base(adapter):
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base")
    return peft.PeftModel.from_pretrained(base, adapter)


def mixed(adapter):
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base")
    return peft.PeftMixedModel.from_pretrained(base, str(adapter))


def with_transformers(adapter):
    base = AutoModelForCausalLM.from_pretrained(adapter.parent / "base")
    base.load_adapter(str(adapter))
    return base


LOADERS = {
    "PeftModel": onto_the_base,
    "PeftMixedModel": mixed,
    "AutoPeftModel": peft.AutoPeftModelForCausalLM.from_pretrained,
    "load_adapter": with_transformers,
    "AutoModel": AutoModelForCausalLM.from_pretrained,
    "load_model": lambda adapter: load_model(str(adapter)),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.filterwarnings("error:Unexpected keyword")
def test_whichever_way_it_is_loaded_it_runs_what_it_was_trained_with(load, adapted, adapter):
    ids = random_ids(2, 9)
    expected = adapted(ids).logits
    assert torch.equal(load(adapter).eval()(ids).logits, expected)
    adapted.get_base_model().config.stablemask = None
    adapted.get_base_model().set_attn_implementation("sdpa")
    assert (adapted(ids).logits - expected).abs().max() > 1e-2


def test_the_settings_stand_in_peft_s_own_file(adapter):
    assert json.loads((adapter / "adapter_config.json").read_text())["stablemask"] == SETTINGS
    assert load_config(str(adapter)).stablemask == SETTINGS
    assert sorted(path.name for path in adapter.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip


def test_an_adapter_that_transformers_saves_keeps_them_too(base, tmp_path, monkeypatch):
    # Transformers 5.24 asks for a newer PEFT there than it needs.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    model = apply_stablemask(load_model(str(base)), gamma=0.05, start=1, shift=SHIFT)
    model.add_adapter(peft.LoraConfig(**LORA, target_modules=["q_proj"]))
    randomise(model).save_pretrained(tmp_path / "adapter")
    ids = random_ids(2, 9)
    assert torch.equal(onto_the_base(tmp_path / "adapter")(ids).logits, model(ids).logits)


def test_the_settings_are_given_to_a_model_within_peft_too(base, tmp_path):
    model = randomise(
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**LORA))
    )
    assert apply_stablemask(model, gamma=0.05, shift=SHIFT, start=1) is model
    assert model.config.stablemask == SETTINGS
    model.save_pretrained(tmp_path / "adapter")
    ids = random_ids(2, 9)
    again = load_model(tmp_path / "adapter")
    torch.testing.assert_close(again(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="must be a Transformers model, got Linear"):
        apply_stablemask(torch.nn.Linear(2, 2))


def test_one_of_several_adapters_has_a_folder_of_its_own(adapted, tmp_path):
    adapted.add_adapter("other", peft.LoraConfig(**LORA))
    adapted.save_pretrained(tmp_path / "both")
    content = (tmp_path / "both" / "other" / "adapter_config.json").read_text()
    assert json.loads(content)["stablemask"] == SETTINGS


def test_a_softmax_adapter_is_left_alone(base, tmp_path):
    plain = peft.get_peft_model(load_model(str(base)), peft.LoraConfig(**LORA))
    plain.save_pretrained(tmp_path / "plain")
    assert "stablemask" not in json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert getattr(loaded.config, "stablemask", None) is None


@pytest.mark.parametrize("keep", [True, False])
def test_shifts_trained_beside_an_adapter_are_loaded_with_it(keep, adapted, tmp_path):
    ids = random_ids(2, 9)
    before = adapted(ids).logits
    for shift in train_shifts(adapted):
        shift.data += 0.3
    expected = adapted(ids).logits
    assert (expected - before).abs().max() > 1e-2
    if keep:
        keep_shifts(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    for load in (onto_the_base, LOADERS["load_model"]):
        assert torch.equal(load(tmp_path / "adapter").eval()(ids).logits, expected)


def test_settings_that_cannot_both_run_are_refused(base, adapter, tmp_path):
    other = apply_stablemask(AutoModelForCausalLM.from_pretrained(base), gamma=0.5)
    with pytest.raises(ValueError, match=r"was trained with StableMask .*0.05.* runs .*0.5"):
        peft.PeftModel.from_pretrained(other, adapter)
    plain = peft.get_peft_model(load_model(str(base)), peft.LoraConfig(**LORA), "plain")
    with pytest.raises(ValueError, match="the model runs softmax for its plain"):
        plain.load_adapter(adapter, "second")
    assert getattr(plain.config, "stablemask", None) is None
    same = apply_stablemask(load_model(str(base)), gamma=0.05, start=1, shift=SHIFT)
    twice = peft.PeftModel.from_pretrained(same, adapter)
    twice.load_adapter(adapter, "second")
    assert twice.config.stablemask == SETTINGS


def test_peft_is_guarded_when_it_is_imported_later(monkeypatch):
    guarded = []
    monkeypatch.setattr(adapters, "_guard", guarded.append)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.delitem(sys.modules, "peft")
    adapters.install()
    importlib.util.find_spec("peft")  # as Transformers does to know whether there is one
    assert guarded == []
    assert guarded == [importlib.import_module("peft")]


@pytest.mark.parametrize(
    ("config", "modules"),
    [
        (peft.LoraConfig(task_type="CAUSAL_LM"), {"q_proj", "v_proj"}),
        (peft.IA3Config(task_type="CAUSAL_LM"), {"k_proj", "v_proj", "down_proj"}),
    ],
)
def test_our_decoder_has_the_default_layers_of_llama(config, modules):
    adapted = peft.get_peft_model(tiny_model(), config)
    trained = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert {module for name in trained for module in modules if module in name} == modules
    assert all(any(module in name for module in modules) for name in trained)


def test_an_adapter_of_our_own_decoder_makes_it_a_stablemask_model(tmp_path):
    tiny_model(attention="softmax").save_pretrained(tmp_path / "base")
    model = apply_stablemask(load_model(str(tmp_path / "base")), gamma=0.3)
    model = randomise(peft.get_peft_model(model, peft.LoraConfig(**LORA)))
    model.save_pretrained(tmp_path / "adapter")
    ids = random_ids(2, 9)
    for load in (onto_the_base, LOADERS["load_model"]):
        loaded = load(tmp_path / "adapter").eval()
        assert loaded.config.attention == "stablemask"
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_local_base_is_remembered_by_its_whole_path(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = peft.get_peft_model(load_model("base"), peft.LoraConfig(**LORA))
    model.save_pretrained("adapter")
    monkeypatch.chdir("/")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(base)
    load_model(str(tmp_path / "adapter"))


# Merging


def test_merging_adds_the_adapter_to_the_weights(base, adapter, tmp_path, capsys):
    train_tokenizer(["the quick brown fox"], 260).save_pretrained(base)
    assert cli.main(["merge", str(adapter), "--out", str(tmp_path / "merged")]) == 0
    assert "merged into" in capsys.readouterr().out
    before, after = (load_file(d / "model.safetensors") for d in (base, tmp_path / "merged"))
    low_rank = load_file(adapter / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        prefix = "base_model.model." + name.removesuffix("weight")
        expected = weight.double()
        if f"{prefix}lora_A.weight" in low_rank:
            b, a = (low_rank[f"{prefix}lora_{side}.weight"].double() for side in "BA")
            expected = expected + 7 / 3 * b @ a
        torch.testing.assert_close(after[name].double(), expected, rtol=1e-6, atol=1e-6)
    content = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert content["architectures"] == ["StableMaskLlamaForCausalLM"]
    merged = load_model(str(tmp_path / "merged"))
    assert merged.config.stablemask == SETTINGS
    ids = random_ids(2, 9)
    expected = load_model(str(adapter))(ids).logits
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
    tokenizers = [
        json.loads((d / "tokenizer.json").read_text()) for d in (base, tmp_path / "merged")
    ]
    assert tokenizers[0] == tokenizers[1]
    assert not any(path.name.startswith(".") for path in tmp_path.iterdir())


def refused(capsys, tmp_path, adapter, words, out="merged"):
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    assert cli.main(["merge", str(adapter), "--out", str(tmp_path / out)]) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert words in message
    assert sorted(tmp_path.rglob("*")) == before


def test_what_cannot_be_merged_says_so(base, adapter, tmp_path, capsys):
    refused(capsys, tmp_path, base, "is a whole model, and no adapter")
    refused(capsys, tmp_path, tmp_path / "missing", "no model folder at")
    refused(capsys, tmp_path, adapter, "is not an empty folder", out="base")
    refused(capsys, tmp_path, adapter, "is not an empty folder", out="base/config.json")
    weights, path = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    state, settings = load_file(weights), json.loads(path.read_text())

    def rewritten(**changes):
        path.write_text(json.dumps(settings | changes))

    rewritten(base_model_name_or_path="/no/such/base")
    refused(capsys, tmp_path, adapter, "is an adapter of '/no/such/base': no model folder")
    rewritten(base_model_name_or_path=str(adapter))
    refused(capsys, tmp_path, adapter, "is an adapter of an adapter")
    make_base(tmp_path / "wide", hidden_size=64)
    rewritten(base_model_name_or_path=str(tmp_path / "wide"))
    refused(capsys, tmp_path, adapter, "hold tensors of another shape")
    make_base(tmp_path / "deep", num_hidden_layers=3)
    rewritten(base_model_name_or_path=str(tmp_path / "deep"))
    refused(capsys, tmp_path, adapter, "got lists for 2 layers")
    rewritten(base_model_name_or_path=str(tmp_path / "deep"), stablemask=SETTINGS | {"shift": 1.0})
    refused(capsys, tmp_path, adapter, "lack tensors")
    rewritten(stablemask={"gamma": -1.0})
    refused(capsys, tmp_path, adapter, "stablemask['gamma'] must be greater than 0")
    rewritten(stablemask=[1])
    refused(capsys, tmp_path, adapter, "stablemask must be a dict")
    rewritten()
    save_file(dict(list(state.items())[1:]), weights)
    refused(capsys, tmp_path, adapter, "lack tensors")
    weights.write_bytes(weights.read_bytes()[:-9])
    refused(capsys, tmp_path, adapter, "damaged or cut short")


def test_an_adapter_without_weights_of_its_layers_cannot_be_merged(base, tmp_path, capsys):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(load_model(str(base)), config).save_pretrained(tmp_path / "prompt")
    refused(capsys, tmp_path, tmp_path / "prompt", "cannot be merged")


def test_an_empty_folder_may_be_there(adapter, tmp_path):
    (tmp_path / "merged").mkdir()
    merge_adapter(str(adapter), tmp_path / "merged")
    assert (tmp_path / "merged" / "model.safetensors").exists()
