"""The processes of one run, started by torchrun or its like: what the main one does first, and alone."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import InputError
from .machine import world_size
from .options import TrainingOptions

Value = TypeVar("Value")

# What the main process does alone, such as tokenizing, may take hours, in which nothing is wrong. A
# process that dies is noticed at once, by its closed connection.
_PATIENCE = timedelta(days=2)
_groups: dict[str, Any] = {}


def join_processes(options: TrainingOptions) -> None:
    """Join the other processes of the run, if a launcher has started more than one.

    Raises:
        InputError: the launcher asks for what the options do not; Accelerate would follow it silently.
    """
    _check_launcher(options)
    if world_size() == 1 or dist.is_initialized():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")


def leave_processes() -> None:
    """Part from the others; threads of a group that lives on may abort the interpreter as it exits."""
    if dist.is_initialized():
        _groups.clear()
        dist.destroy_process_group()


def control_group() -> Any:
    """A gloo group of all processes for what a run agrees on; None where there is one process."""
    return _group("control")


def saving_group() -> Any:
    """One more such group, whose thread in the background must not meet the messages of the first."""
    return _group("saving")


def stopping_group() -> Any:
    """A third, of what is said in the background of a step."""
    return _group("stopping")


def _group(name: str) -> Any:
    """A group that the processes make together when they first ask for it."""
    if not dist.is_initialized():
        return None
    if name not in _groups:
        _groups[name] = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return _groups[name]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def on_main(work: Callable[[], Value]) -> Value:
    """Run ``work`` on the main process alone; every process gets its result, or raises its error."""
    group = control_group()
    if group is None:
        return work()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = work()
        except Exception as error:
            dist.broadcast_object_list([None, error], src=0, group=group)
            raise
    dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        outcome[1].told_by_main = True  # so that the command line says it once
        raise outcome[1]
    return outcome[0]


def main_first(work: Callable[[], Value]) -> Value:
    """Run ``work`` on the main process, and then on the others, who find what it has stored."""
    done: list[Value] = []
    on_main(lambda: done.append(work()))
    return done[0] if done else work()


def gather(value: Value) -> list[Value]:
    """A small value of every process, on every process."""
    group = control_group()
    if group is None:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def total(numbers: torch.Tensor) -> torch.Tensor:
    """The sum over all processes of a tensor on the CPU, in its place."""
    if control_group() is not None:
        dist.all_reduce(numbers, group=control_group())
    return numbers


def _check_launcher(options: TrainingOptions) -> None:
    for name, option in _LAUNCHER.items():
        asked = os.environ.get(f"ACCELERATE_{name}", "").lower()
        same = (name, asked, options.dtype) == ("MIXED_PRECISION", "bf16", "bfloat16")
        if asked not in ("", "no", "false") and not same:
            raise InputError(
                f"the launcher asks for {name.lower()} {asked!r} (ACCELERATE_{name}), which would "
                f"change the run behind its options; leave it out there and give {option}"
            )


_LAUNCHER = {
    "MIXED_PRECISION": "--dtype",
    "DYNAMO_BACKEND": "--compile",
    "USE_FSDP": "--fsdp",
    "USE_DEEPSPEED": "--fsdp",
    "USE_MEGATRON_LM": "--fsdp",
    "USE_PARALLELISM_CONFIG": "--fsdp or --context-parallel",
}
