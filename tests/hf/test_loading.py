import errno
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM

from stablemask.errors import InputError
from stablemask.hf import apply_stablemask, load_model, loading
from stablemask.hf.loading import is_adapter, load_config
from stablemask.models import StableMaskForCausalLM

from ..models.tiny import random_ids, tiny_model


@pytest.fixture
def folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(path, match):
    with pytest.raises(InputError, match=match) as caught:
        load_model(str(path))
    assert "\n" not in str(caught.value)


def test_loads_our_model(folder):
    model = load_model(str(folder))
    assert isinstance(model, StableMaskForCausalLM)
    assert not model.training
    assert next(model.parameters()).dtype == torch.float32
    low = load_model(str(folder), dtype=torch.bfloat16, device="cpu")
    assert next(low.parameters()).dtype == torch.bfloat16
    input_ids = random_ids(1, 6)
    assert torch.equal(model(input_ids).logits, load_model(str(folder))(input_ids).logits)


def llama(**settings):
    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48}
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, **sizes, **settings)
    return LlamaForCausalLM(config)


def test_loads_any_causal_model(tmp_path):
    llama().bfloat16().save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert isinstance(model, LlamaForCausalLM)
    assert next(model.parameters()).dtype == torch.bfloat16


def test_no_folder_or_no_model_in_it(tmp_path, folder, monkeypatch):
    refused("", "no model folder at ''")
    refused(tmp_path / "missing", "no model folder at .*missing")
    refused(folder / "config.json", "is a file; give the folder")
    refused(tmp_path, r"holds no config.json")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("somebody/no-such-model", "no model folder at .* the hub could not be asked")


@pytest.mark.parametrize("dtype", ["float17", "float8_e4m3fn", "int8", "nn", torch.int64])
def test_no_such_dtype(folder, dtype):
    with pytest.raises(InputError, match=r"dtype must be float32, bfloat16, .* got"):
        load_model(str(folder), dtype=dtype)


def test_damaged_config(folder):
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text[: len(text) // 2])
    refused(folder, r"config.json. is not JSON")
    config.write_text("[]")
    refused(folder, "must hold a JSON object")
    config.write_text(json.dumps(json.loads(text) | {"position_encoding": "none"}))
    refused(folder, "cannot load .* position_encoding must be one of")
    config.write_text(json.dumps(json.loads(text) | {"model_type": "no-such-type"}))
    refused(folder, "cannot load .*no-such-type")
    config.write_text('{"a":' * 100_000)
    refused(folder, "config.json. is not JSON: it is nested too deep")
    for field, value, reason in (
        ("model_type", [], "TypeError: unhashable type"),
        ("rope_parameters", [1], "AttributeError: 'list' object"),
        ("layer_types", 5, "layer_types must be None"),
        ("dtype", "float8_e4m3fn", "Float8"),
        ("id2label", 5, "('int' object|got int)"),
    ):
        config.write_text(json.dumps(json.loads(text) | {field: value}))
        refused(folder, f"cannot load .*{reason}")


def test_a_validation_error_is_told_with_its_reason(tmp_path):
    LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_size": "x"}))
    (tmp_path / "model.safetensors").touch()
    refused(
        tmp_path, "Validation error for field 'hidden_size': TypeError: .*expected int, got str"
    )


def test_a_full_disk_is_not_the_models_fault(folder, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        load_model(str(folder))


def test_paths_that_lead_nowhere(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for path in (
        tmp_path / "loop",
        tmp_path / "file" / "model",
        tmp_path / ("n" * 300),
        "n" * 300,
        "n/" + "n" * 99,
    ):
        with pytest.raises(InputError, match=r"no model folder at|cannot read|is a file"):
            load_model(str(path))


def test_damaged_weights(folder):
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    for damaged in (data[:-100], data[:50], b"", b"\xff" * len(data)):
        weights.write_bytes(damaged)
        refused(folder, "damaged or cut short")
    weights.unlink()
    refused(folder, r"holds no .safetensors")
    torch.save({}, folder / "pytorch_model.bin")
    refused(folder, r"holds no .safetensors")


def test_weights_that_do_not_fit_the_config(folder, capfd):
    weights = folder / "model.safetensors"
    state = load_file(weights)
    lacking = {name: tensor for name, tensor in state.items() if "q_proj" not in name}
    save_file(lacking, weights, metadata={"format": "pt"})
    refused(folder, "lack tensors .*0.self_attn.q_proj.weight and 1 more")
    for name, match in (
        ("model.norm.weight", "hold tensors of another shape .* model.norm.weight"),
        ("model.extra.weight", "hold tensors that its config.json does not .* model.extra.weight"),
    ):
        save_file(state | {name: torch.ones(5)}, weights, metadata={"format": "pt"})
        refused(folder, match)
    assert "REPORT" not in capfd.readouterr().err


def test_eight_bits_without_their_scales(tmp_path):
    """Transformers would take the numbers as they stand, 448 times too large or so."""
    llama().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    state = load_file(weights)
    for name in [name for name in state if "proj" in name]:
        scale = state[name].abs().max() / 448
        state[name] = (state[name] / scale).to(torch.float8_e4m3fn)
        state[f"{name}_scale_inv"] = scale.reshape(1, 1)
    save_file(state, weights, metadata={"format": "pt"})
    refused(
        tmp_path, "have scales, as eight-bit weights do, and its config.json has no quantization"
    )


def test_a_config_that_asks_for_stablemask_gets_it_or_is_refused(tmp_path):
    model = llama(stablemask={"gamma": 0.3}).eval()
    model.save_pretrained(tmp_path / "llama")
    loaded = load_model(str(tmp_path / "llama"))
    assert loaded.config._attn_implementation == "stablemask"
    ids = random_ids(1, 6)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    plain = LlamaForCausalLM(LlamaConfig(**model.config.to_dict() | {"stablemask": None})).eval()
    plain.load_state_dict(model.state_dict())
    assert (plain(ids).logits - model(ids).logits).abs().max() > 1e-3

    config = BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=2)
    BloomForCausalLM(config).save_pretrained(tmp_path / "bloom")
    path = tmp_path / "bloom" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stablemask": {"gamma": 0.3}}))
    refused(tmp_path / "bloom", "StableMask cannot run in BloomForCausalLM")
    path = tmp_path / "llama" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stablemask": {"gamma": -1.0}}))
    refused(tmp_path / "llama", r"stablemask\['gamma'\] must be greater than 0")


@pytest.fixture
def adapter(tmp_path):
    """A LoRA adapter as PEFT saves it, of a model beside it, and the model it makes."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(load_model(str(tmp_path / "base")), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", model


def test_an_adapter_brings_its_model(adapter):
    folder, model = adapter
    assert not (folder / "config.json").exists()
    loaded = load_model(str(folder))
    assert isinstance(loaded, LlamaForCausalLM)
    ids = random_ids(2, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert (
        loaded(ids).logits - load_model(str(folder.parent / "base"))(ids).logits
    ).abs().max() > 1e-3
    low = load_model(str(folder), dtype="bfloat16")
    assert next(low.parameters()).dtype == torch.bfloat16


def test_the_settings_of_an_adapter_are_its_own(adapter):
    folder, model = adapter
    apply_stablemask(model.get_base_model(), gamma=0.3, start=1)
    model.config.save_pretrained(folder)
    loaded = load_model(str(folder))
    settings = {"gamma": 0.3, "horizon": None, "hold": model.config.max_position_embeddings - 1}
    assert loaded.config.stablemask == settings | {"start": 1}
    ids = random_ids(2, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert load_config(str(folder)).stablemask == loaded.config.stablemask
    assert getattr(load_config(str(folder.parent / "base")), "stablemask", None) is None
    assert is_adapter(str(folder))
    assert not is_adapter(str(folder.parent / "base"))


def test_an_adapter_that_cannot_be_loaded(adapter, monkeypatch, capfd):
    folder, _ = adapter
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    state, data, text = load_file(weights), weights.read_bytes(), config.read_text()
    weights.write_bytes(data[:-9])
    refused(folder, "adapter .* damaged or cut short")
    lacking = {name: tensor for name, tensor in state.items() if "q_proj.lora_A" not in name}
    save_file(lacking, weights)
    refused(folder, "lack tensors .*q_proj.lora_A")
    save_file({name: torch.ones(5, 5) for name in state}, weights)
    refused(folder, "of another shape")
    assert "REPORT" not in capfd.readouterr().err
    weights.write_bytes(data)

    config.write_text(text[:-30])
    refused(folder, "adapter_config.json. is not JSON")
    settings = json.loads(text)
    config.write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    refused(folder, "names no model")
    config.write_text(json.dumps(settings | {"base_model_name_or_path": "/no/such/base"}))
    refused(folder, "is an adapter of '/no/such/base': no model folder")
    config.write_text(json.dumps(settings | {"peft_type": "NO_SUCH"}))
    refused(folder, "cannot load the adapter")
    config.write_text(text)
    monkeypatch.setattr("stablemask.hf.loading.is_peft_available", lambda: False)
    refused(folder, r"needs PEFT: .*pip install -e '\.\[train\]'")
