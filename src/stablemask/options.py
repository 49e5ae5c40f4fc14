"""Options as dataclasses: one definition serves Python callers, the command line and YAML files."""

import dataclasses
from collections.abc import Sequence
from typing import Any


def option(default: Any, help: str, *, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field that carries its help text and, where limited, its allowed values.

    Pass ``dataclasses.MISSING`` as the default of a required option.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})
