"""Merge a PEFT adapter into the model it was trained on: an ordinary model, StableMask settings kept."""

from dataclasses import MISSING, dataclass
from pathlib import Path

from stablemask.hf.loading import merge_adapter
from stablemask.options import option

SUMMARY = "an adapter and its model as one ordinary model"


@dataclass(kw_only=True)
class MergeOptions:
    adapter: str = option(MISSING, "folder or hub name of the adapter", positional=True)
    out: Path = option(MISSING, "folder for the merged model; must not hold anything")


def run(options: MergeOptions) -> None:
    base = merge_adapter(options.adapter, options.out)
    print(f"{options.out}: {options.adapter} merged into {base}")
