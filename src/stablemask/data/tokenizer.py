"""Training a byte-level BPE tokenizer, and loading any existing one."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from ..reading import first_line
from .hub import local_or_hub

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_TOKEN = "<|endoftext|>"
MIN_VOCAB_SIZE = 256 + 1 + 1  # every byte, the end token, and a merge
PIECE_CHARACTERS = 1 << 14


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE (the pre-tokenisation of GPT-2) on ``documents``.

    Every text is encoded without an unknown token and decodes to itself. ``<|endoftext|>`` (id 0)
    is the end, beginning and padding token; padding goes to the left. Little text may yield fewer
    than ``vocab_size`` tokens. The same documents give the same tokenizer.

    Raises:
        InputError: ``vocab_size`` is below 258.
    """
    check_vocab_size(vocab_size)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    pieces = (piece for document in documents for piece in split_long(document))
    model.train_from_iterator(pieces, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        bos_token=END_TOKEN,
        eos_token=END_TOKEN,
        pad_token=END_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def check_vocab_size(vocab_size: int) -> None:
    if vocab_size < MIN_VOCAB_SIZE:
        raise InputError(
            f"vocabulary size {vocab_size} is too small: 256 bytes, the end token and a merge "
            f"make at least {MIN_VOCAB_SIZE}"
        )


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load an existing tokenizer from a local folder or, by its name, from the Hub.

    Padding goes to the left, with the end token where there is no padding token. Code that comes
    with a tokenizer is never run.

    Raises:
        InputError: it is missing, damaged, cannot be reached, or has no end token.
    """
    wanted = f"tokenizer {str(name_or_path)!r}"
    found = local_or_hub(str(name_or_path), wanted, "no such folder")

    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(found, trust_remote_code=False)
    except Exception as error:  # a damaged file raises anything, a bare Exception included
        raise InputError(f"{wanted} is missing or damaged: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"{wanted} has no end token (eos_token), which separates documents")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many token ids there are up to the highest; some tokenizers number theirs with gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def splitter(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], Iterator[str]]:
    """A function that cuts a document into pieces whose tokens together are those of the whole.

    It is :func:`split_long` for a byte-level tokenizer that is known to part words where that cuts, and
    leaves a document whole for every other: what puts a space in front of a text (Llama 2, Metaspace,
    ``add_prefix_space``) would do so at each cut, and a normalizer may join what a cut parts.
    """
    return split_long if tokenizer.is_fast and _parts_at_cuts(tokenizer) else _whole


def _whole(document: str) -> Iterator[str]:
    yield document


def split_long(document: str) -> Iterator[str]:
    """Cut a long document into pieces that can be tokenised apart, in parallel and little memory.

    A cut stands before a lone space or after a lone newline, where the byte-level pre-tokenizers of
    GPT-2, Llama 3 and Qwen 2 part words in any case. Text without such a place stays in one piece.
    """
    start = 0
    while len(document) - start > PIECE_CHARACTERS:
        cut = _CUT.search(document, start + PIECE_CHARACTERS)
        if cut is None:
            break
        yield document[start : cut.start()]
        start = cut.start()
    yield document[start:]


_CUT = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")

# Patterns without a match that goes over a cut, or that is another where the text ends there.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
LLAMA_3 = _CONTRACTIONS + _WORDS % "{1,3}"  # and GPT-4
QWEN_2 = _CONTRACTIONS + _WORDS % ""


def _parts_at_cuts(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = tokenizer.backend_tokenizer
    normalizer, words = backend.normalizer, backend.pre_tokenizer
    # No character composes with a space or a newline before or after it.
    if normalizer is not None and json.loads(normalizer.__getstate__())["type"] != "NFC":
        return False
    if words is None or not _words_part(json.loads(words.__getstate__())):
        return False
    # Special tokens are read as text.
    added = [token for token in backend.get_added_tokens_decoder().values() if not token.special]
    return not any(t.lstrip or t.rstrip or _mixes_space(t.content) for t in added)


def _words_part(state: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer, as it is saved, ends a word at each cut and adds nothing to the next."""
    *steps, last = state.get("pretokenizers", [state])
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return False
    known = last["use_regex"]
    for step in steps:
        match step:
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"}:
                if regex not in (LLAMA_3, QWEN_2) or step["invert"]:
                    return False
                known = True
            case {"type": "Digits"}:  # which touch no space
                pass
            case _:
                return False
    return known


def _mixes_space(text: str) -> bool:
    """Whether a cut may fall inside ``text``: at the edge of a lone space or newline in it."""
    return not text.isspace() and any(character.isspace() for character in text)
