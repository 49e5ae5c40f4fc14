"""Answering a file of prompts: one JSON line each, written as it is made, and gone on with later."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import strict_json
from ..bars import progress_bar
from ..errors import InputError
from ..reading import parse_json, reading, user_path
from ..writing import writing

ANSWER = "generated_text"  # as Transformers' text-generation pipeline calls it

Record = dict[str, Any]


def read_prompts(path: str | os.PathLike, *, chat: bool = False) -> dict[int, Record]:
    """The prompts of a file by the number of their line; blank lines are left out.

    Args:
        path: ``.txt``, a prompt a line, or ``.jsonl``, a record a line that holds it as ``prompt``.
            Other fields of a record are kept; a number that is not finite becomes null.
        chat: a prompt may also be a list of messages, ``{"role": ..., "content": ...}`` each.

    Raises:
        InputError: there is no such file, it holds no prompts, or some of its lines are not prompts;
            it names them.
    """
    path = user_path(path)
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise InputError(f"prompts must be a .txt or .jsonl file, got {str(path)!r}")
    records: dict[int, Record] = {}
    wrong: dict[int, str] = {}
    with reading(path):
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = line.decode().removesuffix("\r")
            is_text = path.suffix.lower() == ".txt"
            records[number] = {"prompt": text} if is_text else _parse_record(text, chat)
        except ValueError as error:
            wrong[number] = "not UTF-8 text" if isinstance(error, UnicodeError) else str(error)
    refuse_lines(path, wrong)
    if not records:
        raise InputError(f"{str(path)!r} holds no prompts")
    return records


def refuse_lines(path: str | os.PathLike, wrong: dict[int, str]) -> None:
    """Raise InputError where there are wrong lines: the first with its reason, the next by number."""
    if not wrong:
        return
    number, *others = wrong
    also = f"; wrong too: {', '.join(map(str, others[:20]))}" if others else ""
    also += f" and {len(others) - 20} more" if len(others) > 20 else ""
    raise InputError(f"{str(path)!r}, line {number}: {wrong[number]}{also}")


def _parse_record(text: str, chat: bool) -> Record:
    try:
        record = parse_json(text)
    except ValueError as error:
        raise ValueError(f"not a JSON record: {error}") from None
    if not isinstance(record, dict) or "prompt" not in record:
        raise ValueError("a JSON object with the field 'prompt' is wanted")
    if ANSWER in record:
        raise ValueError(f"the field {ANSWER!r} is there already")
    prompt = record["prompt"]
    if not isinstance(prompt, str) and not (chat and _are_messages(prompt)):
        wanted = "text, or a list of messages with role and content" if chat else "text"
        raise ValueError(f"'prompt' holds {type(prompt).__name__}; {wanted} is wanted")
    try:
        _encode(record)  # JSON can escape half of a surrogate pair, which no file can hold
    except RecursionError:
        raise ValueError("not a JSON record: it is nested too deep") from None
    return record


def _are_messages(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(
            isinstance(message, dict) and {"role", "content"} <= set(message) for message in prompt
        )
    )


def open_answers(path: Path, records: Sequence[Record], *, resume: bool) -> int:
    """Count the answers that a file holds, which need not be there yet, so that more can be appended.

    An answer at its end that was cut short is cut off.

    Raises:
        InputError: it holds something and ``resume`` is not asked for, or something other than the
            answers to the first of ``records``.
    """
    with writing(path):
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return 0
        if content and not resume:
            raise InputError(
                f"{str(path)!r} exists; go on with it by --resume, or name another --out"
            )
        *lines, cut = content.split(b"\n")
        for number, line in enumerate([*lines, cut] if cut else lines, 1):
            is_answer = _answers if number <= len(lines) else _begins_to_answer
            if number > len(records) or not is_answer(line, records[number - 1]):
                raise InputError(
                    f"{str(path)!r}, line {number} is no answer to the prompt of its place; "
                    "name another --out, or the prompts it was begun with"
                )
        if cut:
            os.truncate(path, len(content) - len(cut))
    return len(lines)


def _answers(line: bytes, record: Record) -> bool:
    try:
        answer = parse_json(line)
        return isinstance(answer.pop(ANSWER), str) and _encode(answer) == _encode(record)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return False


def _begins_to_answer(line: bytes, record: Record) -> bool:
    beginning = _encode({**record, ANSWER: ""}).removesuffix(b'"}')
    return line.startswith(beginning) or beginning.startswith(line)


def answer_prompts(
    records: Sequence[Record],
    out: Path,
    answer: Callable[..., list[str]],
    *,
    done: int = 0,
    batch_size: int,
    seed: int | None = None,
) -> None:
    """Append the answers to ``records`` to ``out``, in order, each as soon as its batch is made.

    The file, and the folders it needs, are made where they are not there.

    Batches are the same whether or not the run was interrupted, and each has a seed of its own: a run
    that is gone on with writes what it would have written. A batch that was cut is made again whole.

    Args:
        records: from :func:`read_prompts`.
        answer: ``answer(prompts, seed=...)`` returns a continuation for each.
        done: how many the file holds, from :func:`open_answers`.
        seed: of the run; None leaves the batches without.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        out.open("ab") as file,
        progress_bar(total=len(records), initial=done, unit="prompt") as bar,
    ):
        for start in range(done - done % batch_size, len(records), batch_size):
            batch = records[start : start + batch_size]
            batch_seed = None if seed is None else _batch_seed(seed, start // batch_size)
            texts = answer([record["prompt"] for record in batch], seed=batch_seed)
            answered = list(zip(batch, texts, strict=True))
            for record, text in answered[max(0, done - start) :]:
                file.write(_encode({**record, ANSWER: text}) + b"\n")
                file.flush()
                bar.update()


def _encode(record: Record) -> bytes:
    return strict_json.dumps(record, ensure_ascii=False).encode()


def _batch_seed(seed: int, batch: int) -> int:
    """Far apart, so that the batches of one run are not those of the next seed."""
    digest = hashlib.blake2b(f"{seed} {batch}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")
