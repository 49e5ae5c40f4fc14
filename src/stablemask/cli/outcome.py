"""What a training command says in the end, and its exit code."""

import signal

from stablemask.training.options import TrainingOptions
from stablemask.training.run import RunResult, command_line


def report(result: RunResult, options: TrainingOptions) -> int:
    if result.stopped_by is not None:
        print(f"stopped at step {result.step}; go on with: {command_line(options)} --resume")
        return 130 if result.stopped_by is signal.SIGINT else 0
    print(
        f"{result.folder}: {result.step} steps, validation perplexity {result.perplexity:.2f} "
        f"(loss {result.eval_loss:.4f})"
    )
    return 0
