"""What a training command says in the end, and its exit code."""

import signal

from stablemask.training.options import TrainingOptions, world_size
from stablemask.training.processes import is_main, leave_processes
from stablemask.training.run import RunResult, command_line


def report(result: RunResult, options: TrainingOptions) -> int:
    if result.stopped_by is not None:
        launcher = " the same launcher and" if world_size() > 1 else ""
        command = command_line(options)
        _say(f"stopped at step {result.step}; go on with{launcher}: {command} --resume")
        return 130 if result.stopped_by is signal.SIGINT else 0
    _say(
        f"{result.folder}: {result.step} steps, validation perplexity {result.perplexity:.2f} "
        f"(loss {result.eval_loss:.4f})"
    )
    return 0


def _say(line: str) -> None:
    if is_main():
        print(line)
    leave_processes()
