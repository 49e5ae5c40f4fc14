"""Training a byte-level BPE tokenizer, and loading any existing one."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from stablemask.data.hub import is_hub_name, require_hub
from stablemask.errors import InputError

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
    name_or_path = str(name_or_path)
    folder = Path(name_or_path).expanduser()
    is_local = bool(name_or_path) and folder.exists()
    wanted = f"tokenizer {name_or_path!r}"
    if not is_local:
        if not is_hub_name(name_or_path):
            raise InputError(f"{wanted}: no such folder")
        require_hub(wanted)

    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder) if is_local else name_or_path, trust_remote_code=False
        )
    except Exception as error:  # a damaged file raises anything, a bare Exception included
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{wanted} is missing or damaged: {reason}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"{wanted} has no end token (eos_token), which separates documents")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def split_long(document: str) -> Iterator[str]:
    """Cut a long document into pieces that can be tokenised apart, in parallel and little memory.

    A cut stands before a lone space or after a lone newline. The byte-level pre-tokenisers in use
    (of GPT-2, of GPT-4 and Llama 3) part words there in any case, so the tokens are those of the
    whole. Text without such a place stays in one piece.
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
