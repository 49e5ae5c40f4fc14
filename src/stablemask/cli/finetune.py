"""Train a pretrained model further, on text or conversations; --adapt makes it a StableMask model."""

from stablemask.cli.outcome import report
from stablemask.training.finetune import describe_finetuning, finetune
from stablemask.training.finetune_options import FinetuneOptions


def run(options: FinetuneOptions) -> int:
    if options.dry_run:
        print(describe_finetuning(options))
        return 0
    return report(finetune(options), options)
