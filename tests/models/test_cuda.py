"""Our decoder on the operators of CUDA, emulated: as near to float64 as it is on the CPU."""

import copy

import pytest
import torch
from transformers import DynamicCache

from stablemask.models.cache import CACHE
from tests.cuda_contract import emulated
from tests.oracle import assert_no_further_in_norm

from .tiny import FEW_DESIGNS, random_ids, tiny_model

SM90 = (9, 0)
CASES = [
    pytest.param(*design, torch.float32, padded, id=f"{'-'.join(design)}-{name}-float32-sm90")
    for design in FEW_DESIGNS
    for padded, name in ((False, "whole"), (True, "padded"))
]
CASES.append(pytest.param("rope", "stablemask", torch.bfloat16, True, id="bfloat16-sm90"))


def run(model, ids, inputs, real, weights):
    """Logits of one pass, of steps with a cache, and the gradient of every parameter."""
    model.zero_grad()
    logits = model(ids, use_cache=False, **inputs).logits[real]
    (logits.to(weights.dtype) * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    cache = DynamicCache(config=model.config)
    steps = []
    with torch.no_grad():
        for start, stop in [(0, 9), *((i, i + 1) for i in range(9, ids.shape[1]))]:
            mask = {name: mask[:, :stop] for name, mask in inputs.items()}
            steps.append(model(ids[:, start:stop], **{CACHE: cache}, **mask).logits)
    return found | {"logits": logits.detach(), "steps": torch.cat(steps, 1)[real]}


@pytest.mark.parametrize(("position", "kind", "dtype", "padded"), CASES)
def test_passes_steps_and_gradients(position, kind, dtype, padded):
    model = tiny_model(position_encoding=position, attention=kind).to(dtype)
    ids, real = random_ids(2, 14), torch.ones(2, 14, dtype=torch.bool)
    real[1, :5] = not padded
    inputs = {"attention_mask": real.long()} if padded else {}
    weights = torch.randn(int(real.sum()), 61)
    exact = run(copy.deepcopy(model).double(), ids, inputs, real, weights.double())
    plain = run(model, ids, inputs, real, weights)
    with emulated(SM90) as card:
        ours = run(model, ids, inputs, real, weights)
        assert {name.split()[-1] for name, *_ in card.calls} == {"forward", "backward"}
    assert_no_further_in_norm(ours, plain, exact)
