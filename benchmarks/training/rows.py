"""Who is timed: ours with either attention, and what a user would take instead."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ..measure import CannotServeError
from .plain import PlainLoop
from .trainers import llama, ours
from .workload import Contender, Workload

# It asks for an older huggingface-hub than Transformers does, and works with the newer.
INSTALL_LITGPT = (
    "pip install --no-deps litgpt lightning lightning-utilities torchmetrics jsonargparse"
)


@dataclass(frozen=True)
class Row:
    """A model and the loop that trains it.

    Attributes:
        build: from the workload and a folder to write into.
        attention: ``stablemask`` or ``softmax``: what the model's loss must be.
        is_ours: not so those that ours are compared with.
    """

    name: str
    build: Callable[[Workload, Path], Contender]
    attention: str = "softmax"
    is_ours: bool = False


def _litgpt(workload: Workload, folder: Path) -> Contender:
    try:
        from .lit import LitGPT
    except ModuleNotFoundError as error:
        raise CannotServeError(f"needs {error.name}: {INSTALL_LITGPT}") from error
    return LitGPT(workload, folder)


ROWS = {
    row.name: row
    for row in (
        Row("stablemask", partial(ours, attention="stablemask"), "stablemask", is_ours=True),
        Row("softmax", partial(ours, attention="softmax"), is_ours=True),
        Row("llama", llama),
        Row("litgpt", _litgpt),
        Row("plain", lambda workload, folder: PlainLoop(workload)),
    )
}
