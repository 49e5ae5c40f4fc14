import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stablemask.data import load_tokenizer, tokenize_documents, train_tokenizer
from stablemask.data import tokenizer as module
from stablemask.data.sources import load_documents
from stablemask.errors import InputError

from ..test_reading import DEEP


@pytest.fixture(scope="module")
def library() -> list[str]:
    return load_documents("builtin", split="validation")[:20]


@pytest.fixture(scope="module")
def tokenizer(library):
    return train_tokenizer(library, 1000)


def test_end_token_and_padding(tokenizer):
    assert len(tokenizer) == 1000
    assert tokenizer.eos_token == tokenizer.bos_token == tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer("text")["input_ids"][-1] != tokenizer.eos_token_id
    batch = tokenizer(["a", "a longer text"], padding=True)
    assert batch["attention_mask"][0][0] == 0
    assert batch["attention_mask"][0][-1] == 1


@settings(deadline=None)
@given(st.text())
@example("  def f(x):\r\n\treturn x  # \u200d👩‍👩‍👧 e\u0301 \0 \ufeff\n\n")
@example("a<|endoftext|>b , c ' s")
def test_every_text_decodes_to_itself(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_training_repeats(library, tokenizer):
    again = train_tokenizer(iter(library), 1000)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_little_text_yields_a_smaller_vocabulary():
    tokenizer = train_tokenizer(["abab"], 4096)
    assert 257 < len(tokenizer) < 270
    assert tokenizer.decode(tokenizer.encode("ÿ水")) == "ÿ水"


@pytest.mark.parametrize("size", [0, -1, 257])
def test_vocabulary_too_small(size):
    with pytest.raises(InputError, match=f"vocabulary size {size} .* at least 258"):
        train_tokenizer(["text"], size)


def test_long_documents_are_cut_without_a_trace(library, tokenizer, monkeypatch):
    whole = train_tokenizer(library, 600).backend_tokenizer.to_str()
    tokens = tokenize_documents(library, tokenizer)
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 100)
    assert len(list(module.split_long(max(library, key=len)))) > 100
    assert (tokenize_documents(library, tokenizer) == tokens).all()
    assert train_tokenizer(library, 600).backend_tokenizer.to_str() == whole


def test_saved_tokenizer_loads_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.eos_token_id == loaded.pad_token_id == tokenizer.eos_token_id
    assert loaded.padding_side == "left"
    text = "for i in range(10):\n    print('né', i)\n"
    assert loaded.encode(text) == tokenizer.encode(text)


def test_padding_token_is_added_where_there_is_none(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    change(tmp_path / "tokenizer_config.json", pad_token=None, padding_side="right")
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token == "<|endoftext|>"
    assert loaded.padding_side == "left"


def change(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def refused(name: object, *parts: str) -> None:
    with pytest.raises(InputError) as info:
        load_tokenizer(str(name))
    assert "\n" not in str(info.value)
    for part in (str(name), *parts):
        assert part in str(info.value)


def test_missing_and_damaged_tokenizers(tokenizer, tmp_path):
    refused(tmp_path / "none", "no such folder")
    refused("", "no such folder")
    refused("a" * 300 + "/b/c", "no such folder")
    refused("~nobody-of-that-name/a", "~nobody-of-that-name")
    refused(tmp_path, "missing or damaged")
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    whole = file.read_text()
    for damage in (whole[: len(whole) // 2], "", "{}", whole.replace('"BPE"', '"XYZ"'), DEEP):
        file.write_text(damage)
        refused(tmp_path, "missing or damaged")
    file.write_text(whole)
    change(tmp_path / "tokenizer_config.json", eos_token=None)
    refused(tmp_path, "no end token")


def test_code_beside_a_tokenizer_is_not_run(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    change(
        tmp_path / "tokenizer_config.json",
        tokenizer_class="Custom",
        auto_map={"AutoTokenizer": [None, "code.Custom"]},
    )
    (tmp_path / "code.py").write_text("raise SystemExit('code was run')")
    with contextlib.suppress(InputError):
        load_tokenizer(str(tmp_path))


def test_hub_out_of_reach_is_told_at_once():
    refused("owner/name", "cannot reach", "network")
