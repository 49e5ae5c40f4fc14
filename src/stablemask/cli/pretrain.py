"""Train a language model from scratch."""

from stablemask.cli.outcome import report
from stablemask.training.dry_run import describe_cost
from stablemask.training.pretrain import pretrain
from stablemask.training.pretrain_options import PretrainOptions


def run(options: PretrainOptions) -> int:
    if options.dry_run:
        print(describe_cost(options))
        return 0
    return report(pretrain(options), options)
