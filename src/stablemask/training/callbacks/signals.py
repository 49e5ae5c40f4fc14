"""How a run is stopped from outside: by Ctrl-C, a launcher, or a cluster whose time is up."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..processes import stopping_group

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopOnSignal(TrainerCallback):
    """On Ctrl-C, SIGTERM or SIGUSR1, finish the step, save a checkpoint and stop.

    A second Ctrl-C stops at once. (SIGTERM may come twice, from a cluster and again from torchrun.)

    Several processes stop after the same step, though the signal may reach only one of them: with each
    step they begin to tell each other, in the background, and at its end they know. Between a signal and
    the checkpoint there is therefore what is left of the step and at most one more; or what is left of an
    evaluation or of the checkpoint being saved.

    Attributes:
        received: the signal that ends the run, once all processes know it.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._own: int = 0  # the signal that this process got
        self._told = False
        self._flag: Tensor | None = None
        self._exchange: Any = None

    def __enter__(self) -> "StopOnSignal":
        self._process = os.getpid()
        self._previous: dict[signal.Signals, Callable | int | None] = {}
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a fork, which loads data
        if self._own and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._own = self._own or number
        self._tell(self._own)

    def _tell(self, number: int) -> None:
        if self._told or int(os.environ.get("RANK", 0)) > 0:
            return
        self._told = True
        # From a signal handler only an unbuffered write is safe.
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: saving a checkpoint, then stopping\n".encode())

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begin_exchange()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._end_exchange():
            control.should_save = control.should_training_stop = True

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._begin_exchange()
        if self._end_exchange():
            control.should_save = control.should_training_stop = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._begin_exchange()
        if self._end_exchange():
            control.should_training_stop = True

    def _begin_exchange(self) -> None:
        group = stopping_group()
        if group is not None:
            self._flag = torch.tensor(self._own)
            self._exchange = dist.all_reduce(
                self._flag, dist.ReduceOp.MAX, group=group, async_op=True
            )

    def _end_exchange(self) -> bool:
        """Whether the run ends, which all processes answer alike."""
        number = self._own
        if self._exchange is not None:
            self._exchange.wait()
            assert self._flag is not None
            number = int(self._flag)
        if number:
            self.received = signal.Signals(number)
            self._tell(number)
        return self.received is not None
