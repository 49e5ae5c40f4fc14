"""Models that the studies share: each is trained once, by ``pretrain``, and found again by its name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stablemask.data import Corpus
from stablemask.training.assembly import METRICS_FILE
from stablemask.training.pretrain import OPTIONS_FILE, prepare_data, pretrain
from stablemask.training.pretrain_options import PretrainOptions
from stablemask.training.run import RUN_FILE


def trained(work: Path, name: str, options: Mapping[str, Any]) -> Path:
    """The folder of a model, which is trained first, or goes on, where it is not there yet.

    Args:
        work: of all studies.
        name: unique to these options.
        options: of :class:`PretrainOptions`.

    Raises:
        KeyboardInterrupt: the training was stopped by a signal, after a checkpoint.
    """
    folder = work / "models" / name
    resume = (folder / OPTIONS_FILE).exists()
    result = pretrain(
        PretrainOptions(
            out=str(folder), resume=resume, tensorboard=False, keep_checkpoints=1, **options
        )
    )
    if result.stopped_by is not None:
        raise KeyboardInterrupt
    return folder


def corpus_of(options: Mapping[str, Any]) -> Corpus:
    """The tokens a model of these options is trained on and validated with, from the cache."""
    corpus = prepare_data(PretrainOptions(out="-", **options).resolved())
    assert isinstance(corpus, Corpus)
    return corpus


def final_loss(folder: Path) -> float:
    """Validation loss of a trained model over all it was evaluated on, nats per token."""
    return json.loads((folder / RUN_FILE).read_text())["result"]["eval_loss"]


def evaluations(folder: Path) -> list[dict[str, float]]:
    """What each evaluation during training has logged, in order; ``step`` among it."""
    with (folder / METRICS_FILE).open() as lines:
        logs = [json.loads(line) for line in lines]
    return [log for log in logs if "eval_loss" in log]
