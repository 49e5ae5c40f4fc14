"""What a chat template puts around the words of users and assistants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stablemask.errors import InputError
from stablemask.reading import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ChatForm:
    """The tokens that a chat template puts around what is said.

    Attributes:
        opening: before the user's first words.
        turns: after the words of the user, and after those of the assistant: the token that ends the turn,
            and what opens the other's.
    """

    opening: list[int]
    turns: tuple[list[int], list[int]]


def chat_form(tokenizer: PreTrainedTokenizerBase) -> ChatForm:
    """What the chat template writes around the words of users and assistants, found with dummy ones.

    Raises:
        InputError: there is no template, it fails without a system message, it writes turns differently
            as a chat goes on, or no token of its own ends a turn.
    """
    words = [f"words{number}of{number}" for number in range(5)]
    roles = ("user", "assistant") * 3
    messages = [{"role": role, "content": text} for role, text in zip(roles, words, strict=False)]
    try:
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a program, and raises what it likes
        raise InputError(f"the chat template fails: {first_line(error)}") from error
    around = []
    for word in words:
        before, found, text = text.partition(word)
        # A space before a word is in the word's own token.
        around.append(before.rstrip(" "))
        if not found:
            raise InputError("the chat template does not write down what is said")
    opening, *turns = (tokenizer.encode(part, add_special_tokens=False) for part in around)
    if turns[:2] != turns[2:]:
        raise InputError("the chat template writes turns differently as a chat goes on")
    if not all(turn and turn[0] in tokenizer.added_tokens_decoder for turn in turns):
        raise InputError("in the chat template no token of its own ends a turn")
    return ChatForm(opening, (turns[0], turns[1]))
