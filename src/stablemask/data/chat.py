"""Conversations as training examples: rendered by a chat template, scored on the assistant's tokens.

Which records are conversations stands in ``conversations.py``.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from ..reading import first_line
from .conversations import WANTED, is_conversation, messages_of
from .files import check_column
from .records import first_record, read_records
from .splitting import Document, is_held_out

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label of a token that is not scored
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatDataset(Dataset[dict[str, Tensor]]):
    """Conversations as ``input_ids`` and ``labels``, int64 ``(length,)``, labels not shifted."""

    def __init__(self, conversations: list[tuple[np.ndarray, np.ndarray]]) -> None:
        self.conversations = conversations

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids, scored = self.conversations[index]
        input_ids = torch.from_numpy(ids.astype(np.int64))
        return {
            "input_ids": input_ids,
            "labels": input_ids.masked_fill(~torch.from_numpy(scored), IGNORED),
        }

    @property
    def num_tokens(self) -> int:
        return sum(len(ids) for ids, _ in self.conversations)


@dataclass
class ChatCorpus:
    """A tokenizer, the conversations of a source, and what truncation did to them.

    ``key`` is a hash of all tokens. ``cut`` counts conversations longer than the context, and
    ``left_out`` those of them of which no assistant token is left.
    """

    tokenizer: PreTrainedTokenizerBase
    train: ChatDataset
    validation: ChatDataset
    key: str
    cut: int
    left_out: int


def is_chat(source: str, text_column: str = "text") -> bool:
    """Whether ``source`` is to be read as conversations: its first record is one, and has no text.

    Text is what stands in ``text_column``, which counts before a conversation and then warns; where the
    messages themselves stand in it, the record is a conversation.

    Raises:
        InputError: the record is neither, or cannot be read.
    """
    record = first_record(source)
    if record is None:
        return False
    fields, where = record.fields, record.where
    has_text = text_column in fields and not isinstance(fields[text_column], list)
    if not is_conversation(fields):
        check_column(text_column, fields, where, f"for conversations name them {WANTED}")
        return False
    if has_text:
        warnings.warn(
            f"{where}: a record with both {text_column!r} and a conversation is read as text; "
            "--text-column messages reads the conversation",
            stacklevel=2,
        )
    return not has_text


def prepare_chat(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int,
    validation_fraction: float = 0.05,
) -> ChatCorpus:
    """Render and tokenise the conversations of ``source``, each cut to ``context`` tokens.

    A dataset with a ``validation`` split keeps it. From anything else a conversation is held out by a
    hash of its messages; where that leaves one side empty, the last ``validation_fraction`` are.

    Raises:
        InputError: the source cannot be read, a record is no conversation, the tokenizer has no chat
            template or one that does not tell the assistant's tokens, or too few are left.
    """
    from stablemask.bars import progress_bar

    if not tokenizer.is_fast:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path!r} does not tell where in the text its tokens stand "
            "(it is not a fast one), which conversations need"
        )
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template, which conversations need; "
            "take a model made for chat, or plain text"
        ) from error
    render = _render_by_markers if _GENERATION.search(template) else _render_by_prefixes

    sides: dict[str, list] = {"train": [], "validation": []}
    given = False
    digest = hashlib.blake2b(digest_size=16)
    cut = left_out = 0
    for record in progress_bar(read_records(source), desc="rendering", unit=" chats", delay=1):
        messages = messages_of(record.fields, record.where)
        try:
            ids, scored = render(messages, tokenizer)
        except InputError as error:
            raise InputError(f"{record.where}: {error}") from error
        except Exception as error:  # a template is a program, and raises what it likes
            raise InputError(
                f"{record.where}: the chat template fails: {first_line(error)}"
            ) from error
        cut += len(ids) > context
        ids, scored = ids[:context], scored[:context]
        if not scored[1:].any():  # nothing predicts the first token
            left_out += 1
            continue
        digest.update(ids.tobytes() + scored.tobytes())
        document = Document("", json.dumps(messages), record.split)
        held_out = is_held_out(document, validation_fraction)
        given = given or record.split is not None
        sides["validation" if held_out else "train"].append((ids, scored))
    train, validation = sides["train"], sides["validation"]
    if not given and not (train and validation):
        both = train or validation
        held = max(1, round(len(both) * validation_fraction))
        train, validation = both[:-held], both[-held:]
    if not train or not validation:
        raise InputError(
            f"{source!r} leaves {len(train)} conversations to train on and {len(validation)} to hold "
            f"out, and both sides need one; {left_out} have no assistant token within "
            f"{context} tokens"
        )
    return ChatCorpus(
        tokenizer, ChatDataset(train), ChatDataset(validation), digest.hexdigest(), cut, left_out
    )


def pad_conversations(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch, padded on the right: a token keeps the position it has in its own conversation.

    Padding is the token 0, which every model has; a tokenizer's own may lie outside of its vocabulary.
    """

    def pad(tensors: Iterable[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(tensors), batch_first=True, padding_value=value)

    return {
        "input_ids": pad((example["input_ids"] for example in examples), 0),
        "attention_mask": pad((torch.ones_like(example["input_ids"]) for example in examples), 0),
        "labels": pad((example["labels"] for example in examples), IGNORED),
    }


def _render_by_markers(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray]:
    """By the template's own ``{% generation %}`` markers, which are around what the assistant says."""
    rendered: Any = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    return np.array(rendered["input_ids"], np.uint32), np.array(rendered["assistant_masks"], bool)


def _render_by_prefixes(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray]:
    """By what each assistant's message adds to the text of those before it and the generation prompt."""

    def render(count: int, **arguments: Any) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, **arguments)  # type: ignore[return-value]

    text = render(len(messages))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = np.array(encoded["offset_mapping"])[:, 0]
    scored = np.zeros(len(starts), bool)
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index == 0:
            continue
        before, after = render(index, add_generation_prompt=True), render(index + 1)
        if not (after.startswith(before) and text.startswith(after)):
            raise InputError(
                "the chat template rewrites earlier messages, so the assistant's tokens are not known; "
                "mark them in it with {% generation %}, or give one answer to a conversation"
            )
        scored |= (starts >= len(before)) & (starts < len(after))
    return np.array(encoded["input_ids"], np.uint32), scored
