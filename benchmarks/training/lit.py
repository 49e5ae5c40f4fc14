"""litgpt's model in litgpt's own pretraining loop; optional, installed as ``rows.INSTALL_LITGPT`` says."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.pretrain import fit
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.scripts.convert_lit_checkpoint import copy_weights_llama
from litgpt.utils import chunked_cross_entropy, instantiate_torch_optimizer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from .workload import (
    BETAS,
    CLIP,
    IGNORED,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Clock,
    RandomBlocks,
    Workload,
)

NEVER = 1 << 30


class LitGPT:
    """``litgpt pretrain`` from where the model is made, a segment at a time."""

    def __init__(self, workload: Workload, folder: Path) -> None:
        self._workload, self._folder = workload, folder
        self._clock = Clock(workload.device)
        self._fabric = lightning.Fabric(
            accelerator=workload.device,
            devices=1,
            precision="bf16-mixed" if workload.bfloat16 else "32-true",
        )
        self._fabric.launch()
        config = lit_config(workload)
        self._model = GPT(config)
        weights: dict[str, Tensor] = {}
        copy_weights_hf_llama(config, {}, weights, workload.weights())
        self._model.load_state_dict(weights)
        if workload.config.tie_word_embeddings:
            self._model.transformer.wte.weight = self._model.lm_head.weight
        model: Any = torch.compile(self._model) if workload.compile else self._model
        model = self._fabric.setup(model)
        optimizer = instantiate_torch_optimizer(
            {
                "class_path": "torch.optim.AdamW",
                "init_args": {"lr": LEARNING_RATE, "betas": BETAS, "weight_decay": WEIGHT_DECAY},
            },
            model.parameters(),
            fused=workload.device == "cuda",
        )
        self._state: dict[str, Any] = {
            "model": model,
            "optimizer": self._fabric.setup_optimizers(optimizer),
        }
        loader = DataLoader(_WithNext(workload.blocks()), workload.batch_size)
        self._loader = self._fabric.setup_dataloaders(loader)

    def run(self, steps: int) -> float:
        self._state |= {"iter_num": 0, "step_count": 0}
        batch = self._workload.batch_size
        train = TrainArgs(
            save_interval=None, log_interval=10, global_batch_size=batch, micro_batch_size=batch,
            lr_warmup_steps=0, max_tokens=steps * self._workload.tokens, max_norm=CLIP,
        )  # fmt: skip
        block = torch.zeros(1, self._workload.context + 1, dtype=torch.long)
        fit(
            fabric=self._fabric, devices=1, state=self._state,
            train_dataloader=_Timed(self._loader, self._clock, steps),
            val_dataloader=[block.to(self._fabric.device)],
            out_dir=self._folder, tokenizer_dir=None, train=train,
            eval=EvalArgs(interval=NEVER, final_validation=False),
        )  # fmt: skip
        return self._clock.seconds

    def loss(self, ids: Tensor) -> Tensor:
        batch = F.pad(ids, (0, 1), value=IGNORED)
        with self._fabric.autocast():
            return chunked_cross_entropy(self._model(batch[:, :-1]), batch[:, 1:])

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return dict(self._model.named_parameters(remove_duplicate=False))

    def gradients(self) -> dict[str, Tensor]:
        """By their names in Llama."""
        named: dict[str, Tensor] = {}
        gradients = {name: parameter.grad for name, parameter in self.parameters().items()}
        copy_weights_llama(self._model.config, named, gradients)
        return named


def lit_config(workload: Workload) -> Config:
    config = workload.config
    assert config.rope_parameters is not None
    return Config(
        name=workload.preset,
        block_size=config.max_position_embeddings,
        vocab_size=config.vocab_size,
        padded_vocab_size=config.vocab_size,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_query_groups=config.num_key_value_heads,
        n_embd=config.hidden_size,
        head_size=config.head_dim,
        intermediate_size=config.intermediate_size,
        rope_base=config.rope_parameters["rope_theta"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=config.rms_norm_eps,
        mlp_class_name="LLaMAMLP",
    )


class _WithNext(Dataset[Tensor]):
    """Blocks with one token more, which litgpt cuts into inputs and targets; it is ignored, as by the others."""

    def __init__(self, blocks: RandomBlocks) -> None:
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> Tensor:
        return F.pad(self._blocks[index]["input_ids"], (0, 1), value=IGNORED)


class _Timed:
    """A loader that starts the clock with its first batch and stops it when the loop is back for one too many."""

    def __init__(self, loader: Any, clock: Clock, steps: int) -> None:
        self._loader, self._clock, self._steps = loader, clock, steps

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Tensor]:
        for number, batch in enumerate(self._loader):
            if number == 0:
                self._clock.start()
            yield batch
            if number + 1 == self._steps:
                self._clock.stop()
