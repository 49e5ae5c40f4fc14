"""Train a pretrained model further, on text or conversations; --adapt makes it a StableMask model."""

import signal

from stablemask.training.finetune import describe_finetuning, finetune
from stablemask.training.options import FinetuneOptions
from stablemask.training.run import command_line

SUMMARY = "train a pretrained model further, or adapt it to StableMask"


def run(options: FinetuneOptions) -> int:
    if options.dry_run:
        print(describe_finetuning(options))
        return 0
    result = finetune(options)
    if result.stopped_by is not None:
        print(f"stopped at step {result.step}; go on with: {command_line(options)} --resume")
        return 130 if result.stopped_by is signal.SIGINT else 0
    print(
        f"{result.folder}: {result.step} steps, validation perplexity {result.perplexity:.2f} "
        f"(loss {result.eval_loss:.4f})"
    )
    return 0
