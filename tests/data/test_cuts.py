"""Long documents have the tokens that they have whole, and are cut only where it costs none."""

import argparse
import inspect
import sys
import unicodedata
from functools import cache, partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, trainers
from tokenizers.pre_tokenizers import (
    BertPreTokenizer,
    ByteLevel,
    Digits,
    Metaspace,
    Sequence,
    Split,
    Whitespace,
)
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from stablemask.data import tokenize_documents, train_tokenizer
from stablemask.data import tokenizer as module
from stablemask.data.sources import open_source
from stablemask.data.stream import OpenStream, TextStream
from stablemask.data.tokenizer import LLAMA_3, QWEN_2, split_long, splitter

from .conftest import write_json_lines

SOURCE = inspect.getsource(argparse)
# Accents apart and composed, and characters that have a longer form.
ACCENTED = unicodedata.normalize("NFD", SOURCE[:9000].replace("e", "é").replace("o", "ő"))
ACCENTED += SOURCE[9000:18_000].replace("a", "ã").replace("fi", "\ufb01").replace("'", "\u00b4")
DOCUMENT = (ACCENTED + SOURCE)[:36_000]
WORDS = "\n".join(SOURCE.split())[:20_000]  # where a cut is never at a space


def tokenizer_of(*steps, model="BPE", normalizer=None, added=(), later=None):
    """Of pre-tokenizers, trained on a little text; some are put in after training by ``later``."""
    options = {"special_tokens": ["<none>"], "vocab_size": 600, "show_progress": False}
    if any(isinstance(step, ByteLevel) for step in steps):
        options["initial_alphabet"] = sorted(ByteLevel.alphabet())
    make, trainer = {
        "BPE": (partial(models.BPE, unk_token="<none>"), trainers.BpeTrainer),
        "WordPiece": (partial(models.WordPiece, unk_token="<none>"), trainers.WordPieceTrainer),
        "Unigram": (models.Unigram, partial(trainers.UnigramTrainer, unk_token="<none>")),
    }[model]
    backend = Tokenizer(make())
    backend.normalizer = normalizer
    backend.pre_tokenizer = steps[0] if len(steps) == 1 else Sequence([*steps])
    backend.train_from_iterator([DOCUMENT[:20_000]], trainer(**options))
    for name, value in (later or {}).items():
        setattr(backend, name, value)
    backend.add_tokens([*added])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<none>", eos_token="<none>")


plain = partial(ByteLevel, add_prefix_space=False)
raw = partial(plain, use_regex=False)
llama_3, qwen_2 = (Split(Regex(pattern), "isolated") for pattern in (LLAMA_3, QWEN_2))
llama_2 = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
bert = normalizers.BertNormalizer()
spaces = [
    AddedToken("  ", normalized=True),
    AddedToken("\n\n"),
    "self",
    AddedToken("<x>", special=True),
]

CUT = {
    "our own": lambda: train_tokenizer([DOCUMENT[:20_000]], 600),
    "gpt 2": lambda: tokenizer_of(plain()),
    "smollm 2": lambda: tokenizer_of(Digits(individual_digits=True), plain()),
    "llama 3": lambda: tokenizer_of(llama_3, raw()),
    "qwen 2": lambda: tokenizer_of(qwen_2, raw(), normalizer=normalizers.NFC()),
    "gpt neox": lambda: tokenizer_of(plain(), normalizer=normalizers.NFC(), added=spaces),
}  # fmt: skip
WHOLE = {
    "prefix space": lambda: tokenizer_of(ByteLevel(add_prefix_space=True)),
    "llama 3 with a prefix space": lambda: tokenizer_of(
        llama_3, ByteLevel(add_prefix_space=True, use_regex=False)
    ),
    "first": lambda: tokenizer_of(Metaspace(prepend_scheme="first")),
    "always": lambda: tokenizer_of(Metaspace(prepend_scheme="always")),
    "never": lambda: tokenizer_of(Metaspace(prepend_scheme="never")),
    "in one": lambda: tokenizer_of(
        Metaspace(), later={"pre_tokenizer": Metaspace(prepend_scheme="first", split=False)}
    ),
    "unigram": lambda: tokenizer_of(Metaspace(), model="Unigram", normalizer=normalizers.NFKC()),
    "llama 2": lambda: tokenizer_of(
        Metaspace(), later={"pre_tokenizer": None, "normalizer": llama_2}
    ),
    "strip": lambda: tokenizer_of(plain(), normalizer=normalizers.Strip()),
    "nfkc": lambda: tokenizer_of(plain(), normalizer=normalizers.NFKC()),
    "bert": lambda: tokenizer_of(BertPreTokenizer(), model="WordPiece", normalizer=bert),
    "whitespace": lambda: tokenizer_of(Whitespace(), model="WordPiece"),
    "no words": lambda: tokenizer_of(plain(), later={"pre_tokenizer": raw()}),
    "bytes first": lambda: tokenizer_of(raw(), llama_3),
    "other words": lambda: tokenizer_of(Split(Regex(r"\S+\s+\S+"), "isolated"), raw()),
    "a token with a space": lambda: tokenizer_of(plain(), added=["the argument"]),
    "a token with a space before": lambda: tokenizer_of(plain(), added=[" the"]),
    "a token that takes spaces": lambda: tokenizer_of(
        plain(), added=[AddedToken("self", rstrip=True, lstrip=True)]
    ),
}


@pytest.mark.parametrize("name", [*CUT, *WHOLE])
def test_the_tokens_are_those_of_the_whole(name, monkeypatch):
    tokenizer = (CUT | WHOLE)[name]()
    documents = [DOCUMENT, WORDS, " start", "\nend "]
    expected = []
    for document in documents:
        expected += tokenizer(document, add_special_tokens=False)["input_ids"]
        expected.append(tokenizer.eos_token_id)
    for characters in (module.PIECE_CHARACTERS, 20):
        monkeypatch.setattr(module, "PIECE_CHARACTERS", characters)
        assert tokenize_documents(documents, tokenizer).tolist() == expected
        pieces = list(splitter(tokenizer)(DOCUMENT))
        assert "".join(pieces) == DOCUMENT
        assert (len(pieces) > 1) == (name in CUT)


def test_a_stream_has_them_too(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE_CHARACTERS", 20)
    tokenizer = WHOLE["first"]()
    source = open_source(str(write_json_lines(tmp_path / "a.jsonl", [WORDS])))
    stream = TextStream(
        [source], [1], tokenizer, block_size=50, validation_fraction=1e-9, shuffle_buffer=1, seed=0,
        lanes=1,
    )  # fmt: skip
    opened = OpenStream(stream, [0])
    found = torch.cat([opened.draw(k)["input_ids"] for k in range(60)])
    assert found.tolist() == tokenizer(WORDS, add_special_tokens=False)["input_ids"][:3000]
    stream.validation_fraction = 1 - 1e-9
    assert stream.held_out_tokens(source, 3000) == found.tolist()


@cache
def backend_of(name):
    return CUT[name]().backend_tokenizer


@pytest.mark.parametrize("name", CUT)
@given(text=st.text("a 1.'s\n\r\t\x1cé\u0301\u3000水"))
def test_cuts_do_not_part_words(name, text):
    def tokens(part):
        return backend_of(name).encode(part).tokens

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE_CHARACTERS", 1)
        pieces = list(split_long(text))
    assert "".join(pieces) == text
    assert [token for piece in pieces for token in tokens(piece)] == tokens(text)


def test_patterns_are_those_of_the_models():
    assert QWEN_2 == PRETOKENIZE_REGEX
    assert LLAMA_3 == (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )


def test_composing_makes_no_space_and_takes_none():
    """Or a cut might not be one after NFC."""
    characters = map(chr, (*range(0xD800), *range(0xE000, sys.maxunicode + 1)))
    changed = [c for c in characters if not unicodedata.is_normalized("NFC", c)]
    assert len(changed) > 1000
    for character in changed:
        composed = unicodedata.normalize("NFC", character)
        assert all(c.isspace() is character.isspace() for c in composed)
