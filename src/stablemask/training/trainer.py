"""The Transformers Trainer with checkpoints that are whole or absent."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer

from . import checkpoints


class LanguageModelTrainer(Trainer):
    """A Trainer whose checkpoints are renamed into place, the last ``keep`` of them kept."""

    def __init__(self, *args: Any, keep: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
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
