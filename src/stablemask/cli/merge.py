"""Merge a PEFT adapter into the model it was trained on: an ordinary model, StableMask settings kept."""

from stablemask.cli.options import MergeOptions
from stablemask.hf.loading import merge_adapter


def run(options: MergeOptions) -> None:
    base = merge_adapter(options.adapter, options.out)
    print(f"{options.out}: {options.adapter} merged into {base}")
