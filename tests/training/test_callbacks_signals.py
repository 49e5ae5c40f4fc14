"""How a run is stopped from outside, in one process; several of them are in tests/distributed."""

import os
import signal
import time

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from stablemask.training.callbacks import StopOnSignal

from ..models.tiny import tiny_model
from .loop import Blocks, make_loop


class Send(TrainerCallback):
    """Sends this process signals, at an event of a step."""

    def __init__(self, event, step, *numbers):
        self.event, self.step, self.numbers = event, step, numbers
        setattr(self, event, self._send)

    def _send(self, args, state, control, **_):
        if state.global_step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def stopped(folder, *senders, **arguments):
    """The signal that ended a run, its step and its checkpoints; the run evaluates every 3 steps."""
    with StopOnSignal() as stop:
        loop = make_loop(
            tiny_model(), folder, *senders, stop, eval_strategy="steps", eval_steps=3, **arguments
        )
        loop.train()
    return stop.received, loop.state.global_step, sorted(p.name for p in folder.glob("checkpoint*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_the_step_under_way_is_the_last_and_is_saved(number, tmp_path, capfd):
    before = signal.getsignal(number)
    result = stopped(tmp_path, Send("on_substep_end", 3, number), Send("on_step_begin", 3, number))
    assert result == (number, 4, ["checkpoint-4"])
    assert capfd.readouterr().err.count(f"{number.name}: saving a checkpoint, then stopping\n") == 1
    assert signal.getsignal(number) is before


def test_a_signal_during_an_evaluation_takes_no_further_step(tmp_path):
    result = stopped(tmp_path, Send("on_prediction_step", 3, signal.SIGTERM))
    assert result == (signal.SIGTERM, 3, ["checkpoint-3"])


def test_a_signal_while_a_checkpoint_is_saved_takes_no_further_step(tmp_path):
    result = stopped(tmp_path, Send("on_save", 4, signal.SIGUSR1), save_steps=4)
    assert result == (signal.SIGUSR1, 4, ["checkpoint-4"])


def test_a_signal_in_the_evaluation_at_the_start_stops_after_one_step(tmp_path):
    result = stopped(tmp_path, Send("on_prediction_step", 0, signal.SIGTERM), eval_on_start=True)
    assert result == (signal.SIGTERM, 1, ["checkpoint-1"])


def test_the_first_of_several_signals_counts_and_sigterm_may_come_again(tmp_path):
    numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM)
    result = stopped(tmp_path, Send("on_step_begin", 3, *numbers))
    assert result == (signal.SIGUSR1, 4, ["checkpoint-4"])


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        stopped(tmp_path, Send("on_step_begin", 3, signal.SIGINT, signal.SIGINT))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not list(tmp_path.glob("checkpoint*"))


def test_a_process_that_loads_data_is_not_told_to_stop(capfd):
    """A cluster signals every process there is."""
    with StopOnSignal() as stop:
        loader = DataLoader(Blocks(400), num_workers=1, multiprocessing_context="fork")
        batches = iter(loader)
        taken = [next(batches)]
        (worker,) = batches._workers
        for _ in range(2):
            os.kill(worker.pid, signal.SIGINT)
            os.kill(worker.pid, signal.SIGUSR1)
            time.sleep(0.1)
        taken += batches
        assert stop.received is None
    assert torch.equal(torch.cat([b["input_ids"] for b in taken]), Blocks(400).tokens)
    assert "saving" not in capfd.readouterr().err
