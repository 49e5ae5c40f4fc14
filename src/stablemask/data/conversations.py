"""Records as conversations: each form in use, as messages with a ``role`` and a ``content``.

==========================  =================================================================
``messages``                as of OpenAI; a content may be a list of parts of type ``text``
``conversations``           of ShareGPT: ``from`` (``human``, ``gpt``, ``system``) and ``value``
``prompt``, ``completion``  texts: what the user says, and what the assistant answers
``instruction``, ``output`` of Alpaca: the same, with ``input`` on the line after the instruction
==========================  =================================================================

Of several, the first of these counts. A ``system`` text beside them comes first, unless they begin with one.
What would change what is learned and is not read is refused.
"""

from __future__ import annotations

import datetime
import decimal
import json
import uuid
from collections.abc import Iterable
from typing import Any

from stablemask.errors import InputError

ROLES = ("system", "developer", "user", "assistant", "tool")
WANTED = "'messages', or 'prompt' and 'completion'"

_FORMS = ({"messages"}, {"conversations"}, {"prompt", "completion"}, {"instruction", "output"})
_SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system"}
_AS_TEXT = (decimal.Decimal, uuid.UUID, datetime.timedelta)


def is_conversation(columns: Iterable[str]) -> bool:
    """Whether a record with these columns is a conversation, whatever else it has."""
    return any(form <= set(columns) for form in _FORMS)


def messages_of(fields: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """The messages of a record, which JSON can hold: dates, numbers and bytes in them become text.

    Raises:
        InputError: the record is none of the forms, its messages are damaged, or nothing in it is to
            be learned. ``where`` names it.
    """
    found = _messages(fields, where)
    try:
        found = json.loads(json.dumps(found, default=_as_text))
    except RecursionError as error:
        raise InputError(f"{where}: its messages are nested too deep") from error
    except TypeError as error:  # of _as_text, or of a key
        raise InputError(f"{where}: {error}") from error
    if not isinstance(found, list) or not found:
        raise InputError(f"{where}: messages must be a list of at least one")
    messages = [_checked(message, where) for message in found]
    if "assistant" not in [message["role"] for message in messages[1:]]:
        raise InputError(
            f"{where}: no assistant answers another message, so there is nothing to learn"
        )
    return messages


def _messages(fields: dict[str, Any], where: str) -> Any:
    there = {name: value for name, value in fields.items() if value is not None}
    form = next((form for form in _FORMS if form <= there.keys()), None)
    for name in ("tools", "functions"):
        if there.get(name, []) not in ([], "", "[]"):
            raise InputError(f"{where}: {name!r} is not read; leave out what calls them")
    if form == {"messages"}:
        return _after_system(there.get("system"), there["messages"])
    if form == {"conversations"}:
        turns = there["conversations"]
        if not isinstance(turns, list):
            raise InputError(f"{where}: conversations must be a list of at least one")
        turns = [_from_sharegpt(turn, where) for turn in turns]
        return _after_system(there.get("system"), turns)
    is_alpaca = form == {"instruction", "output"}
    question, answer = ("instruction", "output") if is_alpaca else ("prompt", "completion")
    user, assistant = there.get(question), there.get(answer)
    if not all(isinstance(text, str) and text for text in (user, assistant)):
        raise InputError(
            f"{where}: a conversation is wanted: {WANTED} (or of ShareGPT 'conversations', of Alpaca "
            f"'instruction' and 'output'), with text; it has {', '.join(there) or 'nothing'}"
        )
    if is_alpaca and there.get("history"):
        raise InputError(f"{where}: 'history' is not read; give {WANTED}")
    more = there.get("input") if is_alpaca else None
    if more:
        if not isinstance(more, str):
            raise InputError(f"{where}: 'input' must be text, got {type(more).__name__}")
        user = f"{user}\n{more}"
    texts = {"user": user, "assistant": assistant}
    turns = [{"role": role, "content": text} for role, text in texts.items()]
    return _after_system(there.get("system"), turns)


def _after_system(text: Any, messages: Any) -> Any:
    """Messages with a system text that stands beside them in front, unless they begin with one."""
    if not text or not isinstance(messages, list):
        return messages
    first = messages[0] if messages else None
    if isinstance(first, dict) and first.get("role") in ("system", "developer"):
        return messages
    return [{"role": "system", "content": text}, *messages]


def _from_sharegpt(turn: Any, where: str) -> Any:
    if not isinstance(turn, dict) or "from" not in turn:
        return turn  # some have messages under this name
    role = _SHAREGPT.get(str(turn["from"]))
    if role is None:
        raise InputError(
            f"{where}: a turn's 'from' must be one of {', '.join(_SHAREGPT)}, got {turn['from']!r}; "
            f"give others as {WANTED}"
        )
    return {"role": role, "content": turn.get("value"), "weight": turn.get("weight")}


def _checked(message: Any, where: str) -> dict[str, Any]:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise InputError(
            f"{where}: a message's role must be one of {', '.join(ROLES)}, got {role!r}"
        )
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(
            _text_of(part, f"{where}: the content of the {role}'s message") for part in content
        )
    if not isinstance(content, str) and not message.get("tool_calls"):
        raise InputError(f"{where}: the content of the {role}'s message must be text")
    message = {**message, "content": content}
    weight = message.pop("weight", None)
    if role == "assistant" and weight not in (None, 1):  # 0 says that it is not to be learned
        raise InputError(f"{where}: the assistant's 'weight' must be 1, got {weight!r}")
    # Parquet fills what a message lacks with nulls, which templates do not expect.
    return {k: v for k, v in message.items() if v is not None}


def _text_of(part: Any, what: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    text = part.get("text") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(text, str):
        got = f"a part of type {kind!r}" if isinstance(kind, str) else type(part).__name__
        raise InputError(f"{what} must be text or parts of type 'text', got {got}")
    return text


def _as_text(value: Any) -> str:
    """Of what JSON cannot hold: the text of it, where there is one that nobody would take for another."""
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, _AS_TEXT):
        return str(value)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise TypeError("a message holds bytes that are no UTF-8 text") from None
    raise TypeError(f"a message holds {type(value).__name__}, which is no text")
