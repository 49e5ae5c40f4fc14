"""Our model on two ranks against one process: tensor parallel, and fully sharded."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from stablemask.distributed import sequence_positions, shard_sequence, unshard_sequence
from stablemask.hf import keep_shifts, read_shifts, train_shifts
from stablemask.models import StableMaskForCausalLM
from tests.models.tiny import random_ids, tiny_model

DESIGNS = [
    {"attention": "stablemask", "stablemask": {"gamma": "slopes"}},
    {"attention": "stablemask", "stablemask": {"gamma": [0.3, 0.1, 0.03, 0.01]}},
    {"attention": "key-sink"},
    {"attention": "learned-token", "position_encoding": "alibi"},
    {"attention": "head-gate"},
    {"attention": "learned-sink"},
    {"attention": "learned-sink", "position_encoding": "alibi"},
    {"attention": "stablemask", "position_encoding": "alibi"},
    {"stablemask": {"gamma": 0.1, "shift": [[0.5, -1.0, 2.0, 0.0], [1.5, -0.5, 0.25, -3.0]]}},
]


def _whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _sharded(model, mesh):
    styles = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
    plan = {name: styles[style]() for name, style in model.config.base_model_tp_plan.items()}
    parallelize_module(model.model, mesh, plan)
    return model


def _same_logits_and_gradients(model, whole):
    """On a batch with left padding, in float64."""
    input_ids = random_ids(2, 9)
    mask = torch.ones_like(input_ids)
    mask[1, :3] = 0
    for inputs in ({"labels": input_ids}, {"labels": input_ids, "attention_mask": mask}):
        model.zero_grad()
        whole.zero_grad()
        got, expected = model(input_ids, **inputs), whole(input_ids, **inputs)
        torch.testing.assert_close(_whole(got.logits), expected.logits, rtol=0, atol=1e-10)
        got.loss.backward()
        expected.loss.backward()
        gradients = [
            {name: _whole(parameter.grad) for name, parameter in both.named_parameters()}
            for both in (model, whole)
        ]
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)


def _parallelized(design):
    model = tiny_model(torch.float64, **design)
    torch.manual_seed(0)
    whole = tiny_model(torch.float64, **design)
    model = _sharded(model, init_device_mesh("cpu", (2,)))
    assert model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0] == 16
    _same_logits_and_gradients(model, whole)
    if "shift" in design.get("stablemask", {}):
        for shift in [*train_shifts(model), *train_shifts(whole)]:
            shift.data += 0.5
        _same_logits_and_gradients(model, whole)


@pytest.mark.parametrize("design", DESIGNS)
def test_tensor_parallel_equals_one_process(two_ranks, design):
    two_ranks.run(_parallelized, design)


def _from_pretrained(folder, design):
    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE="2")
    from transformers.distributed import DistributedConfig

    model = StableMaskForCausalLM.from_pretrained(
        folder, dtype=torch.float64, distributed_config=DistributedConfig(tp_size=2)
    )
    assert model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0] == 16
    whole = StableMaskForCausalLM.from_pretrained(folder, dtype=torch.float64)
    _same_logits_and_gradients(model, whole)
    prompt = random_ids(2, 5)
    settings = {"max_new_tokens": 6, "do_sample": False}
    for more in ({}, {"cache_implementation": "static"}):
        tokens = model.generate(prompt, **settings, **more)
        assert tokens.equal(whole.generate(prompt, **settings))


@pytest.mark.parametrize("design", DESIGNS[::3])
def test_from_pretrained_with_a_plan_of_transformers(two_ranks, design, tmp_path):
    # Before Transformers 5.24 a head that is gathered must divide.
    tiny_model(torch.float64, vocab_size=62, **design).save_pretrained(tmp_path)
    two_ranks.run(_from_pretrained, tmp_path, design)


def _refused():
    mesh = init_device_mesh("cpu", (2,))
    ids = random_ids(1, 4)
    model = _sharded(tiny_model(num_key_value_heads=1), mesh)
    with pytest.raises(ValueError, match="must divide num_attention_heads"):
        model(ids)
    model = tiny_model()
    parallelize_module(model.model.layers[0], mesh, {"self_attn.q_proj": ColwiseParallel()})
    with pytest.raises(ValueError, match="shard q_proj, k_proj and v_proj alike"):
        model(ids)
    model = tiny_model()
    attention = model.model.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        layer = getattr(attention, name)
        layer.weight = torch.nn.Parameter(layer.weight.chunk(2)[dist.get_rank()])
    with pytest.raises(ValueError, match="gave 2 of 4 heads, and its weight does not say which"):
        model(ids)


def test_heads_of_unknown_owner_are_refused(two_ranks):
    two_ranks.run(_refused)


def _fully_sharded(design):
    model, steps, rank = tiny_model(torch.float64, **design), 3, dist.get_rank()
    torch.manual_seed(0)
    whole = tiny_model(torch.float64, **design)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ours = torch.optim.AdamW(model.parameters(), lr=1e-2)
    theirs = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    for _ in range(steps):
        batch = random_ids(4, 9)
        local = batch.chunk(2)[rank]
        # The mean of the ranks' losses, each over as many tokens, is the loss of the whole batch.
        model(local, labels=local).loss.backward()
        whole(batch, labels=batch).loss.backward()
        for optimiser in (ours, theirs):
            optimiser.step()
            optimiser.zero_grad()
    # AdamW divides by |gradient| + 1e-8, so a rounding error of 1e-15 may grow to 1e-7 of a step.
    tolerance = steps * 1e-2 * 1e-7
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    trained = [{n: _whole(p) for n, p in both.named_parameters()} for both in (model, whole)]
    torch.testing.assert_close(*trained, rtol=0, atol=tolerance)


def _sharded_with_its_shifts():
    """Their rows too are of all ranks; a whole list of them is read from any."""
    model = tiny_model(**DESIGNS[-1])
    torch.manual_seed(0)
    whole = tiny_model(**DESIGNS[-1])
    for both in (model, whole):
        train_shifts(both)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    batch = random_ids(4, 9)
    local = batch.chunk(2)[dist.get_rank()]
    losses = model(local, labels=local).loss, whole(batch, labels=batch).loss
    for both, loss in zip((model, whole), losses):
        loss.backward()
        torch.optim.SGD(both.parameters(), lr=0.5).step()
    found, expected = (torch.tensor(read_shifts(both)) for both in (model, whole))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (expected - torch.tensor(DESIGNS[-1]["stablemask"]["shift"])).abs().max() > 1e-3
    keep_shifts(model)
    assert model.config.stablemask["shift"] == found.tolist()


def test_trained_shifts_of_fsdp_are_those_of_one_process(two_ranks):
    two_ranks.run(_sharded_with_its_shifts)


def _one_sequence_on_two_ranks():
    whole = tiny_model(torch.float64, **DESIGNS[-1])
    model = copy.deepcopy(whole)
    model.model.sequence_group = dist.group.WORLD
    ids = random_ids(2, 12)
    positions = sequence_positions(6)[None]
    for _ in range(2):
        part = model(shard_sequence(ids, 1), position_ids=positions).logits
        expected = whole(ids).logits
        found = unshard_sequence(part, 1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        for shift in [*train_shifts(model), *train_shifts(whole)]:
            shift.data += 0.5


def test_a_sequence_on_two_ranks_has_the_shifts_of_one_process(two_ranks):
    two_ranks.run(_one_sequence_on_two_ranks)


@pytest.mark.parametrize("design", DESIGNS[::2])
def test_optimiser_steps_of_fsdp_equal_one_process(two_ranks, design):
    two_ranks.run(_fully_sharded, design)
