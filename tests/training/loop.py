"""The Trainer on a tiny model and random tokens: what callbacks need of a run, and no more."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

BLOCK = 16


class Blocks(Dataset):
    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(1, 61, (count, BLOCK), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


class Loop(Trainer):
    """Takes the blocks in order, two a step; ``factor`` gives what to multiply the loss of a step by."""

    factor = staticmethod(lambda step: 1.0)

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.step_loss = loss[0] if isinstance(loss, tuple) else loss
        if self.model.training:
            self.step_loss = loss = loss * self.factor(self.state.global_step + 1)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self.grad_norm = super()._get_grad_norm(*args, **kwargs)
        return self.grad_norm


def make_loop(
    model: torch.nn.Module,
    folder: Path,
    *callbacks: TrainerCallback,
    steps: int = 8,
    **arguments: Any,
) -> Loop:
    settings: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 2,
        "use_cpu": True, "lr_scheduler_type": "constant", "learning_rate": 0.01, "report_to": [],
        "disable_tqdm": True, "include_num_input_tokens_seen": "all", "logging_steps": 2,
        "save_steps": 1000, "logging_nan_inf_filter": False, "label_names": ["labels"],
    }  # fmt: skip
    loop = Loop(
        model=model,
        args=TrainingArguments(**settings | arguments),
        train_dataset=Blocks(512),
        eval_dataset=Blocks(4),
    )
    loop.remove_callback(PrinterCallback)
    for callback in callbacks:
        loop.add_callback(callback)
    return loop
