"""Which token serves a model best as its sink: the prefix of the teacher."""

from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...bars import progress_bar
from ...data.sources import BUILTIN, read_documents
from ...inference.model import evaluating
from .reading import front_tokens

TEXTS, LENGTH = 8, 128  # that candidates are tried on
MOST = 32  # candidates
MARGIN = 0.1  # nats


@dataclass(frozen=True)
class Prefix:
    """The token that was chosen, None for none, and the loss of the same tokens after each candidate.

    Attributes:
        losses: in nats a token, by the text of the candidate, "" for none.
    """

    token: int | None
    text: str
    losses: dict[str, float]

    def __str__(self) -> str:
        """What was chosen, in a line."""
        without = self.losses[""]
        if self.token is None:
            return (
                f"none: no token in front makes the model's loss on a text less than {without:.3f}"
            )
        return f"{self.text}: the model's loss on a text is {self.losses[self.text]:.3f} after it, {without:.3f} without"


def candidates(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[int]]:
    """Tokens that texts of the model begin with anyway, and all others that are special."""
    rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    first: list[Any] = [
        *front_tokens(tokenizer)[:1],
        tokenizer.bos_token_id,
        *_first_of_template(tokenizer),
    ]
    # Not all tokens that are marked as special: some vocabularies have thousands that were never used.
    special: list[Any] = [tokenizer.eos_token_id, *tokenizer.all_special_ids]
    known = [
        number for number in dict.fromkeys(first + special) if number is not None and number < rows
    ]
    usual = [number for number in known if number in first]
    return usual, [number for number in known if number not in first][: MOST - len(usual)]


def choose_prefix(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Tensor
) -> Prefix:
    """The candidate after which the model reads texts best.

    One that no text begins with by itself has to be better by ``MARGIN``, for it may say what kind of text
    follows. So has none at all: then the sink is on a token that says something.

    Args:
        model: that attends by softmax.
        texts: ``(texts, length)``, without padding and without anything in front; the first token of each
            is not scored, for nothing would predict it without a candidate.
    """
    texts = texts.to(model.device)
    usual, others = candidates(model, tokenizer)
    tried: list[int | None] = [None, *usual, *others]
    bar = progress_bar(tried, desc="finding the prefix", unit=" tokens", delay=1, leave=False)
    losses = {token: _loss(model, texts, token) for token in bar}
    best = min(tried, key=lambda token: losses[token] + MARGIN * (token not in usual))
    names = {
        token: "" if token is None else str(tokenizer.convert_ids_to_tokens(token))
        for token in losses
    }
    return Prefix(best, names[best], {names[token]: loss for token, loss in losses.items()})


def _loss(model: PreTrainedModel, texts: Tensor, prefix: int | None) -> float:
    read = texts if prefix is None else F.pad(texts, (1, 0), value=prefix)
    total = 0.0
    with evaluating(model):
        for row, text in zip(read, texts, strict=True):  # one at a time, for logits are large
            logits = model(input_ids=row[None], use_cache=False).logits[0, -len(text) : -1]
            total += F.cross_entropy(logits.float(), text[1:]).item()
    return total / len(texts)


def _first_of_template(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if not tokenizer.chat_template:
        return []
    messages = [{"role": "user", "content": "a"}]
    try:
        rendered: Any = tokenizer.apply_chat_template(messages, tokenize=False)
        return tokenizer.encode(rendered, add_special_tokens=False)[:1]
    # A template is a program, and raises what it likes; then it gives no candidate.
    except Exception:
        return []


def sample_text(tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """Text that is on every machine, Python's manual and its library's sources, ``(TEXTS, length)``.

    From inside of documents: where one begins, a token that says so is rewarded for that.
    """
    texts: list[list[int]] = []
    sources = (document.text for document in read_documents(BUILTIN))
    for documents in (iter(topics.values()), sources):
        wanted = len(texts) + TEXTS // 2
        while len(texts) < wanted:
            text = next(documents)
            middle = text[len(text) // 2 :][: 16 * length]
            ids: Any = tokenizer(middle, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= length:
                texts.append(ids[:length])
    return torch.tensor(texts)
