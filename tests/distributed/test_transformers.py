"""Transformers' tensor parallelism: each rank's heads meet their own gamma and their own sink."""

import os

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from stablemask.hf import train_shifts
from tests import marks
from tests.hf.families import MIXED, Family

LLAMA = Family("Llama", "LlamaForCausalLM")
# Transformers' plan for gpt-oss leaves its attention whole; this one shards the sinks too.
GRANITE = Family("Granite with sinks", "GraniteSWAForCausalLM", MIXED)
EPS = torch.finfo(torch.float32).eps
SHIFTS = [[0.5, -1.0, 2.0, 0.0], [1.5, -0.5, 0.25, -3.0]]
CASES = {
    "Llama, slopes": (LLAMA, {"gamma": "slopes"}),
    "Llama, one gamma": (LLAMA, {"gamma": 0.1}),
    "Llama, shifts": (LLAMA, {"gamma": 0.1, "shift": SHIFTS}),
    "Granite, its sinks": (GRANITE, None),
    "Granite, both": (GRANITE, {"gamma": [0.3, 0.1, 0.05, 0.2]}),
}


def _whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _parallel(folder):
    os.environ.update(RANK=str(dist.get_rank()), LOCAL_RANK=str(dist.get_rank()), WORLD_SIZE="2")
    load = AutoModelForCausalLM.from_pretrained
    given = {"dtype": torch.float32, "attn_implementation": "stablemask"}
    model = load(folder, distributed_config=DistributedConfig(tp_size=2), **given).eval()
    whole = load(folder, **given).eval()
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.to_local().shape[0] == 16

    ids = torch.randint(3, 61, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for inputs in ({}, {"attention_mask": mask, "position_ids": positions}):
        got, expected = (m(ids, labels=ids, **inputs) for m in (model, whole))
        scale = expected.logits.abs().max().item()
        real = mask.bool() if inputs else torch.ones_like(mask).bool()
        difference = (_whole(got.logits) - expected.logits)[real]
        assert difference.abs().max() < 64 * EPS * scale
        for loss in (got.loss, expected.loss):
            loss.backward()
    sinks = [name for name, _ in whole.named_parameters() if name.endswith("sinks")]
    assert len(sinks) == (0 if "Llama" in type(whole).__name__ else 2)
    for name in sinks:
        ours, theirs = (m.get_parameter(name).grad for m in (model, whole))
        torch.testing.assert_close(_whole(ours), theirs, rtol=1e-4, atol=1e-6)
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    assert model.generate(ids, **settings).equal(whole.generate(ids, **settings))
    if whole.config.stablemask == CASES["Llama, shifts"][1]:
        trained = [train_shifts(both) for both in (model, whole)]
        for both in (model, whole):
            both(ids, labels=ids).loss.backward()
        for ours, theirs in zip(*trained):
            assert theirs.grad.abs().min() > 0
            torch.testing.assert_close(_whole(ours.grad), theirs.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "case",
    [
        # Older ones hand a layer its queries without their mesh, and its sinks with it: an error.
        pytest.param(case, marks=[marks.transformers_since("5.24")] if family is GRANITE else [])
        for case, (family, _) in CASES.items()
    ],
)
def test_tensor_parallel_equals_one_process(two_ranks, case, tmp_path):
    family, settings = CASES[case]
    # Before Transformers 5.24 a head that is gathered must divide.
    model = family.model_class(family.config(stablemask=settings, vocab_size=62))
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    two_ranks.run(_parallel, tmp_path)
