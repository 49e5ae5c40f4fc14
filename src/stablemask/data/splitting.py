"""Which documents are held out for validation.

- A dataset with a ``validation`` split of its own keeps it.
- Any other document falls to validation when a hash falls below ``validation_fraction``: the hash
  of the file's name relative to the source, or of a record's text. It does not depend on order, the
  machine or the other documents, and a repeated record never stands on both sides.
- A source where that leaves one side empty, such as a single text file, is cut instead: the last
  ``validation_fraction`` of its characters are validation, counted from the start of a line or
  document if one starts there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from ..errors import InputError

Split = Literal["train", "validation"]


class Document(NamedTuple):
    text: str
    key: str  # what the split is decided by, where the source does not decide it itself
    split: Split | None = None


def is_held_out(document: Document, validation_fraction: float) -> bool:
    """Whether ``document`` belongs to validation, by the rule of the module."""
    if document.split is not None:
        return document.split == "validation"
    return uniform_hash(document.key) < validation_fraction


def split_stream(
    documents: Iterable[Document], validation_fraction: float
) -> Iterator[tuple[Split, str]]:
    """The texts of ``documents``, each with its side, by the rule of the module.

    Documents are held back only until there is one on either side, and none whose split is given.
    """
    check_validation_fraction(validation_fraction)
    held: list[tuple[Split, str]] | None = []
    for document in documents:
        side: Split = "validation" if is_held_out(document, validation_fraction) else "train"
        if held is None or document.split is not None:
            yield side, document.text
            continue
        held.append((side, document.text))
        if side != held[0][0]:
            yield from held
            held = None
    if held:
        train, validation = cut_documents([text for _, text in held], validation_fraction)
        yield from (("train", text) for text in train)
        yield from (("validation", text) for text in validation)


def check_validation_fraction(validation_fraction: float) -> None:
    if not 0 < validation_fraction < 1:
        raise InputError(f"validation fraction {validation_fraction} is not between 0 and 1")


def uniform_hash(key: str) -> float:
    # The name of a file may be no Unicode.
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def cut_documents(documents: list[str], validation_fraction: float) -> tuple[list[str], list[str]]:
    """Cut off the end of ``documents``, at the first line that starts inside it."""
    total = sum(map(len, documents))
    remaining = max(1, min(round(total * validation_fraction), total - 1))
    last = len(documents) - 1
    while len(documents[last]) < remaining:
        remaining -= len(documents[last])
        last -= 1
    text = documents[last]
    cut = len(text) - remaining
    if cut > 0 and text[cut - 1] != "\n":
        line_start = text.find("\n", cut) + 1
        if 0 < line_start < len(text):
            cut = line_start
        elif last + 1 < len(documents):  # no line starts there, but a document does
            cut = len(text)
    head, tail = text[:cut], text[cut:]
    train = documents[:last] + [head] * bool(head)
    return train, [tail] * bool(tail) + documents[last + 1 :]
