"""Text that a model writes itself, of the kinds that it writes: what to distil on where no data is given.

=========  ===========================================================================================
``prose``  what follows a first token: one of four is a random one of the vocabulary, the others are as the
           model begins a text after the prefix; all are random where the prefix opens chats, or is none
``code``   what follows one of the beginnings of source files and snippets in ``CODE``
``chats``  what a user and an assistant say in turn, in the form of the chat template: the template opens
           a turn, and the model writes it until it writes the token that ends it
=========  ===========================================================================================

Each text is sampled with the prefix in front, unless it begins with it, as those of many chat templates do.
"""

import copy
import io
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import strict_json
from ..bars import progress_bar
from ..data.cache import hash_of
from ..data.chat_form import ChatForm, chat_form
from ..errors import InputError
from ..inference.author import Author
from ..inference.model import check_length, check_token_ids, evaluating
from ..reading import read_json
from ..writing import write_whole, writing
from .machine import default_dtype

SHARES = {"prose": 0.45, "code": 0.30, "chats": 0.25}
SHARES_WITHOUT_CHATS = {"prose": 0.65, "code": 0.35}

SETTINGS_FILE = "texts.json"


@dataclass(frozen=True)
class SelfWritten:
    """Texts without the prefix that they were written after; by kind, in the order of ``SHARES``.

    Attributes:
        tokens: ``(texts, length)``, int32.
        kinds: of each text, such as ``"prose"``.
        begins_with_prefix: ``(texts,)``, bool: the text's own first token is the prefix.
    """

    tokens: np.ndarray
    kinds: list[str]
    begins_with_prefix: np.ndarray


def write_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | os.PathLike,
    *,
    prefix: int | None,
    texts: int,
    length: int,
    seed: int,
    kinds: dict[str, float] | None = None,
    batch_size: int = 128,
    temperature: float = 0.9,
    progress: bool = True,
) -> SelfWritten:
    """Have the model write texts into ``folder``, or go on with those that are there, or read them.

    The same arguments give the same texts on the same machine, interrupted or not; a kill loses the batch
    that is being written. They are written in bfloat16 where the hardware multiplies it, by a copy of the
    model where that is in another dtype. Without a prefix, texts are written as the model would by itself.

    Args:
        prefix: token id that stands in front of each text as it is written.
        texts: how many.
        length: tokens of each, without the prefix.
        kinds: shares by kind, of any sum; default: ``SHARES``, or where there is no chat template to
            write by, ``SHARES_WITHOUT_CHATS``.

    Raises:
        InputError: an argument is out of its range, the template does not allow the chats that ``kinds``
            asks for, the folder holds texts of other settings, or cannot be written to.
    """
    folder = Path(folder)
    _check(model, prefix, temperature, texts=texts, length=length, seed=seed, batch_size=batch_size)
    kinds, form, without = _kinds(kinds, tokenizer, length)
    counts = _counts(kinds, texts)
    settings = {
        "model": _model_key(model), "prefix": prefix, "kinds": counts, "length": length, "seed": seed,
        "batch_size": batch_size, "temperature": temperature,
    }  # fmt: skip
    _keep_settings(folder, settings)

    batches = [
        (kind, min(batch_size, count - start))
        for kind, count in counts.items()
        for start in range(0, count, batch_size)
    ]
    paths = [folder / f"{number:05}-{kind}.npy" for number, (kind, _) in enumerate(batches)]
    written = [_load(path, (rows, length)) for path, (_, rows) in zip(paths, batches, strict=True)]
    missing = [number for number, tokens in enumerate(written) if tokens is None]
    if missing and without:
        print(f"stablemask: the model writes itself no chats: {without}", file=sys.stderr)
    if missing:
        tokens_left = sum(batches[number][1] for number in missing) * length
        writer = _writing_copy(model)
        with (
            writing(folder),
            evaluating(writer),
            progress_bar(
                total=texts * length, initial=texts * length - tokens_left, show=progress,
                desc="writing texts", unit=" tokens", unit_scale=True,
            ) as bar,
        ):  # fmt: skip
            author = Author(writer, tokenizer, prefix, length, temperature, form, bar.update)
            for number in missing:
                # By its number, so that a batch is what it would be in a run that was not interrupted.
                rng = np.random.default_rng((seed, number))
                batch = author.write(*batches[number], rng)
                _save(paths[number], batch)
                written[number] = batch
    tokens = np.concatenate([batch for batch in written if batch is not None])
    return SelfWritten(
        tokens,
        [kind for kind, count in counts.items() for _ in range(count)],
        tokens[:, 0] == (-1 if prefix is None else prefix),
    )


def _writing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with the same parameters, cast where the hardware is faster with another dtype.

    Its parameters are not frozen even where the model's are: PyTorch multiplies a batch's last hidden states
    by a frozen head one row at a time, each by a copy of the head.
    """
    dtype = getattr(torch, default_dtype(large=True))
    parameters = {
        id(parameter): nn.Parameter(parameter.detach().to(dtype))
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, parameters)


def _check(model: PreTrainedModel, prefix: int | None, temperature: float, **counts: int) -> None:
    for name, least in (("texts", 1), ("length", 2), ("seed", 0), ("batch_size", 1)):
        if counts[name] < least:
            raise InputError(f"{name} must be at least {least}, got {counts[name]}")
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature must be a positive number, got {temperature}")
    if prefix is not None:
        check_token_ids(model, [prefix])
    length = counts["length"]
    check_length(model, length + (prefix is not None), f"a text of {length} tokens")


def _kinds(
    kinds: dict[str, float] | None, tokenizer: PreTrainedTokenizerBase, length: int
) -> tuple[dict[str, float], ChatForm | None, str | None]:
    """Shares, the form of chats, and why there are none by default though there is a template."""
    form = without = None
    try:
        form = chat_form(tokenizer)
        if len(form.opening) >= length:
            without = (
                f"the template takes {len(form.opening)} of {length} tokens before the first word"
            )
    except InputError as error:
        without = str(error)
    if kinds is None:
        if without is None:
            return SHARES, form, None
        return SHARES_WITHOUT_CHATS, form, without if tokenizer.chat_template else None
    if not kinds.keys() <= SHARES.keys():
        raise InputError(f"kinds must be of {', '.join(SHARES)}, got {', '.join(kinds)}")
    if not all(0 <= share < math.inf for share in kinds.values()) or not any(kinds.values()):
        raise InputError(f"the shares of kinds must be 0 or more, and one above 0, got {kinds}")
    if kinds.get("chats") and without is not None:
        raise InputError(f"no chats can be written: {without}")
    return kinds, form, None


def _counts(shares: dict[str, float], texts: int) -> dict[str, int]:
    """Texts of each kind, in the order of ``SHARES``: rounded down, and what is left to the largest rests."""
    exact = {kind: texts * shares.get(kind, 0) / sum(shares.values()) for kind in SHARES}
    counts = {kind: int(number) for kind, number in exact.items()}
    by_rest = sorted(exact, key=lambda kind: counts[kind] - exact[kind])
    for kind in by_rest[: texts - sum(counts.values())]:
        counts[kind] += 1
    return counts


def _model_key(model: PreTrainedModel) -> str:
    """Told apart by sums of the bits of each parameter, which no order of adding changes."""
    return hash_of(
        f"{name} {tuple(parameter.shape)} {parameter.dtype} "
        f"{parameter.detach().reshape(-1).view(torch.uint8).sum(dtype=torch.int64)}"
        for name, parameter in model.named_parameters()
    )


def _keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS_FILE
    if path.exists():
        kept = read_json(path)
        kept = kept if isinstance(kept, dict) else {}
        for name, value in settings.items():
            if kept.get(name) != value:
                raise InputError(
                    f"{str(folder)!r} holds texts of another {name} ({kept.get(name)}, now {value}); "
                    "remove it, or name another --out"
                )
        return
    with writing(folder):
        write_whole(path, strict_json.dumps(settings, indent=2) + "\n")


def _load(path: Path, shape: tuple[int, int]) -> np.ndarray | None:
    try:
        tokens = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError):  # not there, or cut short with the machine's power
        return None
    return tokens if tokens.shape == shape and tokens.dtype == np.int32 else None


def _save(path: Path, tokens: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, tokens)
    write_whole(path, content.getvalue())
