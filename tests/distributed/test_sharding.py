"""Our model under FSDP2, trained by hand on gloo, and distributed checkpoints on other numbers of ranks."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from stablemask.models import StableMaskConfig, StableMaskForCausalLM
from stablemask.training.sharding import is_sharded, shard
from stablemask.training.state import load_state, save_state, whole_weights

STEPS = 20
ROWS = 4  # sequences in a step, over all ranks


def build() -> StableMaskForCausalLM:
    torch.manual_seed(0)
    config = StableMaskConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    return StableMaskForCausalLM(config).double()


def train(model, optimizer, steps: range) -> list[float]:
    """Losses of the whole batch, of which each rank computes its part."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(64, (ROWS, 32), generator=generator).chunk(size)[rank]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if size > 1:
            dist.all_reduce(loss)
            loss /= size
        losses.append(loss.item())
    return losses


def adamw(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


@pytest.fixture(scope="module")
def trained() -> tuple[StableMaskForCausalLM, list[float]]:
    """On one process, and its losses."""
    model = build()
    return model, train(model, adamw(model), range(STEPS))


def check_losses(expected: list[float]) -> None:
    model = build()
    shard(model, dtype="float32")
    assert is_sharded(model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    losses = train(model, adamw(model), range(STEPS))
    # In float64 nothing but the order of summation differs.
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=0)


def test_losses_are_those_of_one_process_on_four_ranks(four_ranks, trained):
    four_ranks.run(check_losses, trained[1])


def write_half_way(folder: str, wait: bool) -> None:
    model = build()
    shard(model, dtype="float32")
    optimizer = adamw(model)
    train(model, optimizer, range(STEPS // 2))
    writing = save_state(model, optimizer, Path(folder) / "state", wait=wait)
    assert (writing is None) == wait
    # What is written is of that moment, whatever comes after it.
    train(model, optimizer, range(STEPS // 2, STEPS))
    if writing is not None:
        writing.result()
    weights = whole_weights(model)
    if dist.get_rank() == 0:
        whole = build()
        whole.save_pretrained(folder, state_dict=weights)


def go_on(folder: str, expected: list[float], sharded: bool = True) -> None:
    model = build()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    if sharded:
        shard(model, dtype="float32")
    optimizer = adamw(model)
    load_state(model, optimizer, Path(folder) / "state")
    losses = train(model, optimizer, range(STEPS // 2, STEPS))
    torch.testing.assert_close(losses, expected[STEPS // 2 :], rtol=1e-9, atol=0)


@pytest.mark.parametrize("wait", [True, False], ids=["waited for", "in the background"])
def test_a_checkpoint_of_two_ranks_goes_on_on_four_and_on_one(
    wait, two_ranks, four_ranks, trained, tmp_path
):
    reference, alone = trained
    two_ranks.run(write_half_way, str(tmp_path), wait)
    four_ranks.run(go_on, str(tmp_path), alone)
    go_on(str(tmp_path), alone, sharded=False)

    reference.save_pretrained(tmp_path / "reference")
    ours, theirs = (load_file(p / "model.safetensors") for p in (tmp_path, tmp_path / "reference"))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-6, atol=1e-9)
    loaded = StableMaskForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    ids = torch.arange(32)[None]
    torch.testing.assert_close(loaded(ids).logits, reference(ids).logits, rtol=1e-6, atol=1e-8)
