"""What a model was trained on, as the folder of its run has it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.mixture import parse_mixture
from ..data.sources import HUB_PREFIX
from ..errors import InputError
from ..options import load_yaml
from ..reading import read_json, user_path
from .finetune_options import FinetuneOptions
from .pretrain_options import PretrainOptions
from .run import RUN_FILE


@dataclass(frozen=True)
class TrainedOn:
    """Sources as :func:`~stablemask.data.load_documents` takes them, and the column of their text."""

    sources: list[str]
    text_column: str


def trained_on(model: str) -> TrainedOn | None:
    """The text of the run that made ``model``, or None where no run's folder holds it.

    Args:
        model: the folder of a run, or a checkpoint in it; a hub name has no such record.

    Raises:
        InputError: the record is damaged, or names what is no text to score: conversations, or a
            dataset that was streamed and would have to be loaded whole.
    """
    for folder in _folders(user_path(model)):
        for command in (FinetuneOptions.command, PretrainOptions.command):
            file = folder / f"{command}.yaml"
            if file.is_file():
                return _recorded(folder, load_yaml(file), file)
    return None


def _folders(folder: Path) -> Iterator[Path]:
    yield folder
    if folder.parent.name == "checkpoints":
        yield folder.parent.parent


def _recorded(folder: Path, options: dict[str, Any], file: Path) -> TrainedOn:
    mixture, data = options.get("mixture") or [], options.get("data")
    if options.get("adapt") and data is None:
        raise InputError(
            f"{folder} was trained on text that its model wrote itself; name a text to score: --data"
        )
    column = options.get("text_column", "text")
    if not (isinstance(mixture, list) and isinstance(column, str) and isinstance(data, str)):
        raise InputError(f"{file} is damaged: it names no data")
    sources = list(parse_mixture([*map(str, mixture)])) if mixture else [data]
    if (folder / RUN_FILE).is_file():
        record = read_json(folder / RUN_FILE)
        if isinstance(record, dict) and record.get("conversations"):
            raise InputError(
                f"{folder} was finetuned on conversations; name a text to score: --data"
            )
    if options.get("streaming") and any(source.startswith(HUB_PREFIX) for source in sources):
        raise InputError(
            f"{folder} was trained on a stream of {', '.join(sources)}; name a text to score: --data"
        )
    return TrainedOn(sources, column)
