"""How far a run is, how fast, and at what loss: in ``metrics.jsonl``, on a bar, and in what is logged."""

import json
import math
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...bars import progress_bar
from ...errors import InputError
from ...evaluation.perplexity import perplexity_of, perplexity_text
from ...models.configuration import StableMaskConfig
from ...models.cost import flops_per_token
from ...reading import first_line, parse_json, reading
from ...writing import write_whole
from ..base_model import text_part

_LOSS = ("loss", "grad_norm", "learning_rate")
# What the loss is made of where a model is adapted.
_DISTILLED = ("kl", "first_token", "excess", "alpha")


class Record(TrainerCallback):
    """One line of JSON a log or evaluation, in ``metrics.jsonl``, and a progress bar on stderr.

    What it works out it also adds to the log itself, for the callbacks after it, on the main process:

        tokens, tokens_per_second   over all processes; evaluating and saving do not count as time
        mfu                         model FLOPs utilisation, a share of what the devices can do
        memory                      peak bytes of this process, on the GPU where there is one
        data_wait                   share of the time that was spent waiting for data
        seconds_left                until the last step, evaluations and checkpoints included

    A resumed run drops the lines past its checkpoint first, so that no step stands twice.

    Args:
        path: the file.
        flops_per_token: of one training step, see :func:`training_flops`; None leaves ``mfu`` out.
        peak_flops: FLOP/s of one device; None leaves ``mfu`` out.
        data_seconds: how long training has waited for data up to now; None leaves ``data_wait`` out.
    """

    def __init__(
        self,
        path: Path,
        *,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        data_seconds: Callable[[], float] | None = None,
    ) -> None:
        self.path = path
        self._flops_per_token = flops_per_token
        self._peak_flops = peak_flops
        self._data_seconds = data_seconds
        self._bar: tqdm | None = None
        self._evaluation: tqdm | None = None
        self._first_step, self._first_time = 0, 0.0
        self._timed_to = 0.0
        # Since the last log, evaluating and saving left out; at the last log.
        self._seconds, self._tokens, self._waited = 0.0, 0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # A checkpoint brings the steps between logs, evaluations and saves of the part before.
        state.compute_steps(args, state.max_steps)
        if not state.is_world_process_zero:
            return
        # A run that begins again evaluates step 0 again.
        _keep_lines_up_to(self.path, state.global_step or -1)
        self._bar = progress_bar(
            total=state.max_steps,
            initial=state.global_step,
            unit="step",
            dynamic_ncols=True,
        )
        self._first_step, self._first_time = state.global_step, time.perf_counter()
        self._timed_to = self._first_time
        self._tokens = state.num_input_tokens_seen
        self._waited = self._data_seconds() if self._data_seconds else 0.0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._count_time()
        if self._bar is not None:
            self._bar.update()

    def _count_time(self) -> None:
        now = time.perf_counter()
        self._seconds += now - self._timed_to
        self._timed_to = now

    def on_save(self, *_: Any, **__: Any) -> None:
        self._timed_to = time.perf_counter()

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **_: Any,
    ) -> None:
        if self._evaluation is None:
            self._evaluation = progress_bar(
                total=len(eval_dataloader),
                desc="evaluating",
                unit="batch",
                dynamic_ncols=True,
                leave=False,
                delay=1,
                show=state.is_world_process_zero,
            )
        self._evaluation.update()

    def on_evaluate(self, *_: Any, **__: Any) -> None:
        if self._evaluation is not None:
            self._evaluation.close()
            self._evaluation = None
        self._timed_to = time.perf_counter()

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
        names: list[str] = []
        if "loss" in logs:
            added = self._work_out(args, state)
            logs |= added
            self._show(state, logs)
            names += [*_LOSS, *_DISTILLED, *added, "skipped"]
        elif "eval_loss" in logs:
            logs["eval_perplexity"] = perplexity_of(logs["eval_loss"])
            self._bar.write(_evaluation_line(state.global_step, logs), file=sys.stderr)
            names += ["eval_loss", "eval_perplexity", *(n for n in logs if n in _PROBED)]
        self.add({"step": state.global_step} | {n: logs[n] for n in names if n in logs})

    def add(self, row: dict[str, Any]) -> None:
        """Add a line to the file, on the main process; JSON knows no number that is not finite."""
        if self._bar is None:
            return
        numbers = {name: value for name, value in row.items() if _is_json(value)}
        with self.path.open("a") as file:
            file.write(json.dumps(numbers) + "\n")

    def _work_out(self, args: TrainingArguments, state: TrainerState) -> dict[str, float]:
        """What a log of training adds to the Trainer's, since the last one."""
        self._count_time()
        tokens = state.num_input_tokens_seen
        speed = (tokens - self._tokens) / self._seconds
        added: dict[str, float] = {"tokens": tokens, "tokens_per_second": round(speed, 1)}
        if self._flops_per_token and self._peak_flops:
            peak = self._peak_flops * args.world_size
            added["mfu"] = round(speed * self._flops_per_token / peak, 4)
        added["memory"] = _peak_memory(args.device)
        if self._data_seconds is not None:
            waited = self._data_seconds()
            added["data_wait"] = round((waited - self._waited) / self._seconds, 4)
            self._waited = waited
        elapsed = time.perf_counter() - self._first_time
        left = elapsed / (state.global_step - self._first_step)
        added["seconds_left"] = round(left * (state.max_steps - state.global_step), 1)
        self._tokens, self._seconds = tokens, 0.0
        return added

    def _show(self, state: TrainerState, logs: dict[str, float]) -> None:
        """On the bar, or where there is none as a line of its own."""
        assert self._bar is not None
        text = f"loss {logs['loss']:.3f}, {logs['tokens_per_second']:,.0f} tokens/s"
        if "first_token" in logs:
            text += f", attention on the first token {logs['first_token']:.1%}".replace("%", " %")
        if "mfu" in logs:
            text += f", {logs['mfu']:.0%} of peak".replace("%", " %")
        if logs.get("skipped"):
            text += f", {logs['skipped']} skipped"
        if not self._bar.disable:  # the bar itself shows the time left
            self._bar.set_postfix_str(text)
            return
        left = tqdm.format_interval(logs["seconds_left"])
        count = f"step {state.global_step}/{state.max_steps}"
        print(f"{count}: {text}, {left} left", file=sys.stderr, flush=True)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def training_flops(model: Any, context: int) -> float:
    """Floating-point operations per token of a training step of a causal LM, by the usual count.

        6 N + 12 L w T

    for N weights that multiply, so without embedding tables, L layers, w the width of all query heads and T
    ``context``, all of the part that reads text; for our own models as :func:`stablemask.models.cost.flops_per_token` has it, which is the same. Frozen
    weights have no gradient of their own and count 4. Every expert of a mixture counts, used or not.
    """
    config = model.config.get_text_config(decoder=True)
    parts = text_part(model)
    tables = {id(m.weight) for p in parts for m in p.modules() if isinstance(m, nn.Embedding)}
    head = model.get_output_embeddings()
    if head is not None:
        tables.discard(id(head.weight))  # where it is tied to a table
    every = {id(p): p for part in parts for p in part.parameters()}
    weights = [p for number, p in every.items() if number not in tables]
    if isinstance(config, StableMaskConfig):
        training: float = flops_per_token(config, context).training
    else:
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        attention = 12 * config.num_hidden_layers * width * context
        training = 6 * sum(p.numel() for p in weights) + attention
    return training - 2 * sum(p.numel() for p in weights if not p.requires_grad)


_PROBED = ("eval_first_token_attention", "eval_first_token_attention_max", "eval_mask_ratio")


def _evaluation_line(step: int, logs: dict[str, float]) -> str:
    line = f"step {step}: validation perplexity {perplexity_text(logs['eval_perplexity'])}"
    if "eval_first_token_attention" in logs:
        first, mask = logs["eval_first_token_attention"], logs["eval_mask_ratio"]
        line += f", attention on the first token {first:.1%}, mask ratio {mask:.1%}"
    return line.replace("%", " %")


def _peak_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """What a :class:`Record` of a finished run has written.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    with reading(path):
        lines = path.read_bytes().splitlines()
    try:
        return [_row(line) for line in lines]
    except ValueError as error:
        raise InputError(f"{path} is damaged: {first_line(error)}") from error


def _row(line: bytes) -> dict[str, Any]:
    row = parse_json(line)
    if not (isinstance(row, dict) and isinstance(row.get("step"), int)):
        raise ValueError(f"{row!r} is of no step")
    return row


def _keep_lines_up_to(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines():
        try:
            if _row(line)["step"] <= step:
                kept.append(line + b"\n")
        except ValueError:
            continue  # a line that a kill cut short
    write_whole(path, b"".join(kept))
