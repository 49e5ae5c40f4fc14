"""What a training command says in the end, and its exit code."""

import signal

from stablemask.evaluation.perplexity import perplexity_text
from stablemask.shell import runnable
from stablemask.training.machine import world_size
from stablemask.training.options import TrainingOptions
from stablemask.training.processes import is_main, leave_processes
from stablemask.training.run import RunResult, command_line, given


def report(result: RunResult, options: TrainingOptions) -> int:
    """Say how the run ended and part from its other processes; the exit code."""
    line, code = _outcome(result, options)
    if is_main():
        print(line)
    leave_processes()
    return code


def _outcome(result: RunResult, options: TrainingOptions) -> tuple[str, int]:
    if result.stopped_by is None:
        return (
            f"{result.folder}: {result.step} steps, validation perplexity {perplexity_text(given(result.perplexity))} "
            f"(loss {result.eval_loss:.4f})"
        ), 0
    launcher = " the same launcher and" if world_size() > 1 else ""
    line = f"stopped at step {result.step}; go on with{launcher}: {runnable(command_line(options))} --resume"
    return line, 130 if result.stopped_by is signal.SIGINT else 0
