"""Conversations as training examples: rendered by a chat template, scored on the assistant's tokens.

A record holds ``messages``, each with a ``role`` and a ``content`` (the format of OpenAI), or a
``prompt`` and a ``completion``, which are a user's and an assistant's message.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from stablemask.errors import InputError

from .files import first_line
from .records import Record, read_records, record_files
from .sources import BUILTIN, HUB_PREFIX, uniform_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROLES = ("system", "developer", "user", "assistant", "tool")
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
    """Whether the first record of ``source`` is a conversation and has no ``text_column``."""
    if source == BUILTIN or (not source.startswith(HUB_PREFIX) and not record_files(source)):
        return False
    for record in read_records(source):
        names = record.fields.keys()
        return text_column not in names and (
            "messages" in names or {"prompt", "completion"} <= names
        )
    return False


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
    from tqdm import tqdm

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
    for record in tqdm(
        read_records(source), desc="rendering", unit=" chats", delay=1, disable=None
    ):
        messages = _messages(record)
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
        held_out = uniform_hash(json.dumps(messages)) < validation_fraction
        given = given or record.split is not None
        sides[record.split or ("validation" if held_out else "train")].append((ids, scored))
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


def pad_conversations(examples: list[dict[str, Tensor]], pad_token_id: int) -> dict[str, Tensor]:
    """A batch, padded on the right: a token keeps the position it has in its own conversation."""

    def pad(tensors: Iterable[Tensor], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(tensors), batch_first=True, padding_value=value)

    return {
        "input_ids": pad((example["input_ids"] for example in examples), pad_token_id),
        "attention_mask": pad((torch.ones_like(example["input_ids"]) for example in examples), 0),
        "labels": pad((example["labels"] for example in examples), IGNORED),
    }


def _messages(record: Record) -> list[dict[str, Any]]:
    fields, where = record.fields, record.where
    if "messages" not in fields:
        texts = (fields.get("prompt"), fields.get("completion"))
        if not all(isinstance(text, str) and text for text in texts):
            raise InputError(
                f"{where}: a conversation is wanted: messages, or a prompt and a completion of text"
            )
        return [
            {"role": r, "content": t} for r, t in zip(("user", "assistant"), texts, strict=True)
        ]
    messages = fields["messages"]
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{where}: messages must be a list of at least one")
    for message in messages:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise InputError(
                f"{where}: a message's role must be one of {', '.join(ROLES)}, got {role!r}"
            )
        if not isinstance(message.get("content"), str) and not message.get("tool_calls"):
            raise InputError(f"{where}: the content of the {role}'s message must be text")
    roles = [message["role"] for message in messages]
    if "assistant" not in roles[1:]:
        raise InputError(
            f"{where}: no assistant answers another message, so there is nothing to learn"
        )
    # Parquet fills what a message lacks with nulls, which templates do not expect.
    return [{k: v for k, v in message.items() if v is not None} for message in messages]


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
