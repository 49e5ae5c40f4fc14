"""A decoder and its training loop in plain PyTorch, after Karpathy's nanoGPT.

As there, the model is one file with one matrix for query, key and value and
``F.scaled_dot_product_attention``, and the loop has nothing around it. In place of GPT-2's layers stand
those of the models it is timed against: RMSNorm, SwiGLU and rotary positions.

Letters: B batch, T length, H heads, D head_dim.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stablemask.models.configuration import StableMaskConfig

from .workload import BETAS, CLIP, LEARNING_RATE, WEIGHT_DECAY, Clock, Workload, next_tokens


class Attention(nn.Module):
    def __init__(self, config: StableMaskConfig) -> None:
        super().__init__()
        assert config.head_dim is not None
        self.head_dim = config.head_dim
        self.widths = [config.query_width, config.key_value_width, config.key_value_width]
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.widths), bias=False)
        self.o_proj = nn.Linear(config.query_width, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in self.qkv_proj(x).split(self.widths, dim=-1)
        )
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        grouped = query.shape[1] != key.shape[1]
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on (B, H, T, D); cos and sin are (T, D)."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, config: StableMaskConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: StableMaskConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class PlainDecoder(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, config: StableMaskConfig) -> None:
        super().__init__()
        assert config.head_dim is not None
        assert config.rope_parameters is not None
        embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model: Any = nn.ModuleDict(
            {
                "embed_tokens": embed_tokens,
                "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
                "norm": nn.RMSNorm(config.hidden_size, config.rms_norm_eps),
            }
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = embed_tokens.weight
        theta = config.rope_parameters["rope_theta"]
        frequencies = theta ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
        angles = torch.arange(config.max_position_embeddings)[:, None] * frequencies
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """The loss. ``ids`` and ``targets`` are (B, T); a target of -100 does not count."""
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = self.model["embed_tokens"](ids)
        for block in self.model["layers"]:
            x = block(x, cos, sin)
        logits = self.lm_head(self.model["norm"](x))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class PlainLoop:
    """The loop of nanoGPT's ``train.py``."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._clock = Clock(workload.device)
        with torch.device(workload.device):
            self._model = PlainDecoder(workload.config)
        self._model.load_state_dict(_join(workload.weights()))
        self._model.to(workload.device)
        self._forward = torch.compile(self._model) if workload.compile else self._model
        parameters = list(self._model.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.dim() > 1]},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            groups, lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True,
        )  # fmt: skip
        self._blocks = workload.blocks().ids

    def run(self, steps: int) -> float:
        batch = self._batch()
        self._clock.start()
        for step in range(steps):
            for group in self._optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / steps)) / 2
            with self._workload.autocast():
                loss = self._forward(batch, next_tokens(batch))
            batch = self._batch()  # while a GPU is at work
            loss.backward()
            nn.utils.clip_grad_norm_(self._model.parameters(), CLIP)
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        self._clock.stop()
        return self._clock.seconds

    def _batch(self) -> Tensor:
        ids = self._blocks[torch.randint(len(self._blocks), (self._workload.batch_size,))]
        if self._workload.device == "cuda":
            ids = ids.pin_memory().to("cuda", non_blocking=True)
        return ids

    def loss(self, ids: Tensor) -> Tensor:
        with self._workload.autocast():  # not compiled: other lengths than the loop's would slow it
            return self._model(ids, next_tokens(ids))

    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self._model.named_parameters(remove_duplicate=False))

    def gradients(self) -> dict[str, Tensor]:
        """By their names in Llama, whose query, key and value have a matrix each."""
        named = {}
        for name, parameter in self.parameters().items():
            gradient = parameter.grad
            assert gradient is not None
            if "qkv_proj" in name:
                widths = self._model.model["layers"][0].self_attn.widths
                for letter, part in zip("qkv", gradient.split(widths)):
                    named[name.replace("qkv", letter)] = part
            else:
                named[name] = gradient
        return named


def _join(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Llama's weights as :class:`PlainDecoder` has them."""
    joined = {}
    for name, weight in weights.items():
        if "q_proj" in name:
            parts = [weights[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
            joined[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif "k_proj" not in name and "v_proj" not in name:
            joined[name] = weight
    return joined
