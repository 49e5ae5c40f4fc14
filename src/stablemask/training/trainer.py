"""The Transformers Trainer: checkpoints whole or absent, evaluation by the token, adapters complete."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

from . import checkpoints


class LanguageModelTrainer(Trainer):
    """A Trainer for language models.

    Its checkpoints are renamed into place, the last ``keep`` of them kept. ``eval_loss`` is the mean over
    tokens, whatever the lengths in a batch. An adapter is saved with its model's configuration.
    """

    def __init__(self, *, model: Any, keep: int, **kwargs: Any) -> None:
        self._use_cache = model.config.use_cache  # which a Trainer turns off, and would save so
        super().__init__(model=model, **kwargs)
        self.keep = keep
        assert self.args.output_dir is not None
        self._folder = Path(self.args.output_dir)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._folder / checkpoints.INCOMPLETE)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        final = self._folder / name
        if final.exists():
            return
        partial = self._folder / checkpoints.INCOMPLETE
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            full = shutil.disk_usage(self._folder).free < 1 << 20
            shutil.rmtree(partial, ignore_errors=True)
            if full:  # which torch.save reports as a RuntimeError of its own
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(final)) from error
            raise
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.commit(partial / name, final)
            shutil.rmtree(partial, ignore_errors=True)
            for old in checkpoints.list_checkpoints(self._folder)[: -self.keep]:
                checkpoints.remove(old)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model: Any = self.model
        model.config.use_cache = self._use_cache
        super()._save(output_dir, state_dict)
        if self.args.should_save and not isinstance(model, PreTrainedModel):  # a PEFT model
            model.config.save_pretrained(output_dir)
        model.config.use_cache = self.args.use_cache

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        count = int((inputs["labels"][:, 1:] != -100).sum())
        loss, *rest = super().prediction_step(model, inputs, *args, **kwargs)
        assert loss is not None
        self._eval_nats += loss.item() * count
        self._eval_tokens += count
        return loss, *rest

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._eval_nats, self._eval_tokens = 0.0, 0
        output = super().evaluation_loop(*args, **kwargs)
        sums = torch.tensor(
            [self._eval_nats, self._eval_tokens], dtype=torch.float64, device=self.args.device
        )
        nats, tokens = self.accelerator.reduce(sums).tolist()
        assert output.metrics is not None
        output.metrics["eval_loss"] = nats / tokens
        return output
