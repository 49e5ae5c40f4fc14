"""Train a language model from scratch."""

import signal

from stablemask.training.options import PretrainOptions
from stablemask.training.pretrain import command_line, describe_cost, pretrain

SUMMARY = "train a language model from scratch"


def run(options: PretrainOptions) -> int:
    if options.dry_run:
        print(describe_cost(options))
        return 0
    result = pretrain(options)
    if result.stopped_by is not None:
        print(f"stopped at step {result.step}; go on with: {command_line(options)} --resume")
        return 130 if result.stopped_by is signal.SIGINT else 0
    print(
        f"{result.folder}: {result.step} steps, validation perplexity {result.perplexity:.2f} "
        f"(loss {result.eval_loss:.4f})"
    )
    return 0
