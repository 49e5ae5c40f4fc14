"""What a run shows and records while it goes, and how it is stopped: callbacks for the Trainer."""

import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import RunError


class Record(TrainerCallback):
    """One line of JSON a log or evaluation, in ``metrics.jsonl``, and a progress bar on stderr.

    A resumed run drops the lines past its checkpoint first, so that no step stands twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bar: tqdm | None = None
        self._evaluation: tqdm | None = None
        self._begun = 0.0
        self._first_step, self._first_time = 0, 0.0
        self._tokens, self._seconds = 0, 0.0  # at the last log; since it, evaluation left out

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        # A run that begins again evaluates step 0 again.
        _keep_lines_up_to(self.path, state.global_step or -1)
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )
        self._first_step, self._first_time = state.global_step, time.perf_counter()
        self._tokens = state.num_input_tokens_seen

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._begun = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._seconds += time.perf_counter() - self._begun
        if self._bar is not None:
            self._bar.update()

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **_: Any,
    ) -> None:
        if self._evaluation is None:
            self._evaluation = tqdm(
                total=len(eval_dataloader),
                desc="evaluating",
                unit="batch",
                dynamic_ncols=True,
                leave=False,
                delay=1,
                disable=not (state.is_world_process_zero and sys.stderr.isatty()),
            )
        self._evaluation.update()

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if self._bar is None or not logs or "train_loss" in logs:
            return
        row: dict[str, float] = {"step": state.global_step}
        if "shift" in logs:
            row["shift"] = logs["shift"]
        if "loss" in logs:
            row |= {name: logs[name] for name in ("loss", "grad_norm", "learning_rate")}
            row["tokens"] = state.num_input_tokens_seen
            row["tokens_per_second"] = round((row["tokens"] - self._tokens) / self._seconds, 1)
            self._tokens, self._seconds = state.num_input_tokens_seen, 0.0
            self._show(f"loss {row['loss']:.3f}, {row['tokens_per_second']:,.0f} tokens/s", state)
        elif "eval_loss" in logs:
            row["eval_loss"] = logs["eval_loss"]
            row["eval_perplexity"] = math.exp(min(logs["eval_loss"], 700.0))
            shift = f" with log M shifted by {row['shift']:g}" if row.get("shift") else ""
            self._bar.write(
                f"step {state.global_step}: validation perplexity {row['eval_perplexity']:.2f}{shift}",
                file=sys.stderr,
            )
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def _show(self, text: str, state: TrainerState) -> None:
        """On the bar, or where there is no terminal as a line of its own."""
        assert self._bar is not None
        if not self._bar.disable:
            self._bar.set_postfix_str(text)
            return
        elapsed = time.perf_counter() - self._first_time
        left = elapsed / (state.global_step - self._first_step)
        left *= state.max_steps - state.global_step
        count = f"step {state.global_step}/{state.max_steps}"
        print(f"{count}: {text}, {tqdm.format_interval(left)} left", file=sys.stderr, flush=True)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class StopWhenNotFinite(TrainerCallback):
    """Refuse a step whose gradients are not finite, before it reaches the weights."""

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module | None = None,
        **_: Any,
    ) -> None:
        assert model is not None
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            raise RunError(
                f"the loss or its gradients are not finite at step {state.global_step + 1}; "
                "the last checkpoint is kept. Try a lower --learning-rate or a longer --warmup"
            )


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM, finish the step, save a checkpoint and stop; a second one stops at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        # From a signal handler only an unbuffered write is safe.
        os.write(2, f"\n{self.received.name}: saving a checkpoint, then stopping\n".encode())

    def __enter__(self) -> "StopOnSignal":
        self._previous: dict[signal.Signals, Callable | int | None] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.received is not None:
            control.should_save = control.should_training_stop = True


def _keep_lines_up_to(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a line that a kill cut short
        if row["step"] <= step:
            kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    os.replace(partial, path)
