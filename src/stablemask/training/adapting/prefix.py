"""Which token serves a model best as its sink: the prefix of the teacher."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...bars import progress_bar
from ...data.sources import BUILTIN, read_documents
from ...errors import InputError
from ...inference.model import evaluating

TEXTS, LENGTH = 4, 128  # that candidates are tried on
MOST = 32  # candidates


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


def candidates(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens of a tokenizer, and the first token of its chat template."""
    ids: list[int | None] = [tokenizer.bos_token_id, *_first_of_template(tokenizer)]
    ids += [tokenizer.eos_token_id, *tokenizer.all_special_ids]
    ids += [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
    rows = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    known = [number for number in dict.fromkeys(ids) if number is not None and number < rows]
    return known[:MOST]


def choose_prefix(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Tensor
) -> Prefix:
    """The candidate after which the model reads texts best, if better than without any.

    Args:
        model: that attends by softmax.
        texts: ``(texts, length)``, without padding and without anything in front; the first token of each
            is not scored, for nothing would predict it without a candidate.
    """
    texts = texts.to(model.device)
    tried = [None, *candidates(model, tokenizer)]
    bar = progress_bar(tried, desc="finding the prefix", unit=" tokens", delay=1, leave=False)
    losses = {token: _loss(model, texts, token) for token in bar}
    best = min(losses, key=losses.__getitem__)
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
    except (
        Exception
    ):  # a template is a program, and raises what it likes; then it gives no candidate
        return []


def sample_text(tokenizer: PreTrainedTokenizerBase, length: int) -> Tensor:
    """Text that is on every machine, the standard library's sources, ``(TEXTS, length)``."""
    ids: list[int] = []
    for document in read_documents(BUILTIN):
        ids += tokenizer(document.text[: 16 * length], add_special_tokens=False, verbose=False)[
            "input_ids"
        ][:length]
        if len(ids) >= TEXTS * length:
            break
    else:
        raise InputError("the standard library's sources are not there; name a text: --data")
    return torch.tensor(ids[: TEXTS * length]).view(TEXTS, length)
