"""Training steps of StableMask against softmax, in turn on the same machine and data.

``sdpa`` is the softmax model with ``F.scaled_dot_product_attention`` put in the place of our op: what a
user would run without this package, and the floor.
"""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models import modeling
from ..models.presets import preset_config

ROWS = ("sdpa", "softmax", "stablemask")


def measure_training(
    preset: str, *, batch_size: int, steps: int, dtype: str, device: torch.device
) -> dict[str, dict[str, float]]:
    """Tokens per second of each row, and its median ratio to ``sdpa`` over the steps."""
    torch.manual_seed(0)
    models: dict[str, torch.nn.Module] = {}
    for row in ROWS:
        config = preset_config(preset, attention="stablemask" if row == "stablemask" else "softmax")
        models[row] = modeling.StableMaskForCausalLM(config)
        models[row].to(device)
    optimizers = {
        row: torch.optim.AdamW(model.parameters(), lr=1e-4) for row, model in models.items()
    }
    shape = (batch_size, config.max_position_embeddings)
    times: dict[str, list[float]] = {row: [] for row in ROWS}
    for step in range(-2, steps):
        batch = torch.randint(config.vocab_size, shape, device=device)
        for row in ROWS[step % 3 :] + ROWS[: step % 3]:
            elapsed = _step(row, models[row], optimizers[row], batch, dtype)
            if step >= 0:
                times[row].append(elapsed)
    tokens = batch.numel()
    return {
        row: {
            "tokens_per_second": round(tokens / statistics.median(times[row]), 1),
            "ratio": round(
                statistics.median(
                    floor / own for own, floor in zip(times[row], times["sdpa"], strict=True)
                ),
                3,
            ),
        }
        for row in ROWS
    }


def _step(
    row: str, model: Any, optimizer: torch.optim.Optimizer, batch: Tensor, dtype: str
) -> float:
    device = batch.device.type
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    with _stock_attention(row == "sdpa"):
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@contextmanager
def _stock_attention(enabled: bool) -> Iterator[None]:
    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    if not enabled:
        yield
        return
    with patch.object(modeling, "sink_attention", attend):
        yield
