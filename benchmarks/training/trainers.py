"""Rows on the Transformers Trainer: ours as ``stablemask pretrain`` builds it, and Llama on the plain one."""

from copy import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from stablemask.models.configuration import preset_config
from stablemask.models.modeling import StableMaskForCausalLM
from stablemask.training.assembly import build_trainer
from stablemask.training.pretrain_options import PretrainOptions

from .workload import BETAS, CLIP, LEARNING_RATE, WEIGHT_DECAY, Clock, Workload

NEVER = 1 << 30
# A Trainer would evaluate and save after its last step.
NOTHING_ELSE: dict[str, Any] = {"eval_strategy": "no", "save_strategy": "no"}


class OnTrainer:
    """A model on a Trainer, whose ``train`` is called again for every segment."""

    def __init__(self, workload: Workload, trainer: Trainer) -> None:
        self._workload, self._trainer = workload, trainer
        self._clock = Clock(workload.device)
        trainer.add_callback(_Times(self._clock))
        assert isinstance(trainer.model, PreTrainedModel)
        self._model: Any = trainer.model

    def run(self, steps: int) -> float:
        self._trainer.args.max_steps = steps
        self._trainer.train()
        return self._clock.seconds

    def loss(self, ids: Tensor) -> Tensor:
        with self._workload.autocast():
            return self._model(input_ids=ids, labels=ids, use_cache=False).loss

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return dict(self._model.named_parameters(remove_duplicate=False))

    def gradients(self) -> dict[str, Tensor]:
        gradients: dict[str, Any] = {name: p.grad for name, p in self.parameters().items()}
        return gradients


class _Times(TrainerCallback):
    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step == 0:
            self._clock.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step == state.max_steps:
            self._clock.stop()


def ours(workload: Workload, folder: Path, attention: str) -> OnTrainer:
    """Our decoder on our Trainer, by the options of ``stablemask pretrain``."""
    options = PretrainOptions(
        preset=workload.preset, attention=attention, steps=NEVER, out=str(folder),
        batch_size=workload.batch_size, dtype=workload.dtype, compile=workload.compile,
        learning_rate=LEARNING_RATE, beta2=BETAS[1], weight_decay=WEIGHT_DECAY,
        clip=CLIP, warmup=0, tensorboard=False,
    ).resolved()  # fmt: skip
    with torch.device(workload.device):
        model = StableMaskForCausalLM(preset_config(workload.preset, attention=attention))
    model.load_state_dict(workload.weights())
    model.chunked_loss = True
    blocks = workload.blocks()
    folder.mkdir(exist_ok=True)
    data: Any = SimpleNamespace(tokenizer=None, train=blocks, validation=blocks, key="")
    return OnTrainer(workload, build_trainer(options, folder, model, data, None, **NOTHING_ELSE))


def llama_config(workload: Workload) -> LlamaConfig:
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
        "rope_parameters", "tie_word_embeddings",
    )  # fmt: skip
    return LlamaConfig(**{name: copy(getattr(workload.config, name)) for name in same})


def llama(workload: Workload, folder: Path) -> OnTrainer:
    """Transformers' Llama with stock SDPA on the Trainer as it comes."""
    with torch.device(workload.device):
        model = LlamaForCausalLM._from_config(llama_config(workload), attn_implementation="sdpa")
    model.load_state_dict(workload.weights())
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=NEVER,
        per_device_train_batch_size=workload.batch_size,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=CLIP,
        bf16=workload.bfloat16,
        torch_compile=workload.compile,
        use_cpu=workload.device == "cpu",
        dataloader_pin_memory=workload.device == "cuda",
        **NOTHING_ELSE,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=workload.blocks())
    trainer.remove_callback(PrinterCallback)
    return OnTrainer(workload, trainer)
