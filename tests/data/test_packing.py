import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from stablemask.data import PackedDataset, packing, tokenize_documents, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat, and the hat\n" * 20], 300)


def unpack(tokens: np.ndarray, tokenizer) -> list[str]:
    ends = np.flatnonzero(tokens == tokenizer.eos_token_id)
    return [tokenizer.decode(part[part != 0]) for part in np.split(tokens, ends + 1)[:-1]]


@settings(deadline=None)
@given(documents=st.lists(st.text()), batch=st.integers(1, 50))
@example(documents=["", "a<|endoftext|>b", "", "<|endoftext|>"], batch=3)
def test_tokens_give_back_the_documents(tokenizer, documents, batch):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BATCH_CHARACTERS", batch)
        tokens = tokenize_documents(iter(documents), tokenizer)
    assert tokens.dtype == np.uint16
    assert np.count_nonzero(tokens == tokenizer.eos_token_id) == len(documents)
    assert unpack(tokens, tokenizer) == documents
    assert (tokenize_documents(documents, tokenizer) == tokens).all()


def test_tokenizer_is_left_as_it_was(tokenizer):
    tokenizer.backend_tokenizer.enable_truncation(3)
    before = tokenizer.backend_tokenizer.to_str()
    tokens = tokenize_documents(["the cat sat on the mat"], tokenizer)
    assert unpack(tokens, tokenizer) == ["the cat sat on the mat"]
    assert tokenizer.backend_tokenizer.to_str() == before
    tokenizer.backend_tokenizer.no_truncation()


@pytest.mark.parametrize("step", [1, 1 << 16])
def test_large_vocabulary_takes_wider_ids(step):
    words = {f"word{number}": number for number in range(0, (1 << 16) + 1, step)}
    large = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="word0")), eos_token="word0"
    )
    tokens = tokenize_documents(["word65536"], large)
    assert tokens.dtype == np.uint32
    assert tokens.tolist() == [1 << 16, 0]


def test_tokenizer_in_python():
    tokenizer = ByT5Tokenizer()
    tokens = tokenize_documents(["né</s>", ""], tokenizer)
    end = tokenizer.eos_token_id
    assert list(tokens) == [byte + 3 for byte in "né</s>".encode()] + [end, end]


def test_blocks():
    dataset = PackedDataset(np.arange(100, dtype=np.uint16), 32)
    assert len(dataset) == 3
    for number, block in enumerate(dataset):  # iteration ends at the last whole block
        expected = torch.arange(number * 32, number * 32 + 32)
        assert block.keys() == {"input_ids", "labels"}
        assert block["input_ids"].dtype == torch.int64
        assert torch.equal(block["input_ids"], expected)
        assert torch.equal(block["labels"], expected)
    assert number == 2
    for index in (-1, 3):
        with pytest.raises(IndexError):
            dataset[index]
