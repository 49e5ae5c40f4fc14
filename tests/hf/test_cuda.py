"""Transformers' decoders on the operators of CUDA, emulated: as near to float64 as they are on the CPU."""

import copy

import pytest
import torch
from transformers import DynamicCache

from stablemask.models.cache import CACHE
from tests import marks
from tests.cuda_contract import emulated
from tests.oracle import assert_no_further_in_norm

from .families import FAMILIES, LENGTH, PSEUDO, Family, outcome

SM90 = (9, 0)
# Whole, sliding, keys and values of two widths, and sinks of its own.
COMMON = ("Llama", "Qwen2, sliding", "DeepSeek-V3", "Granite with sinks")


def cases():
    for family in FAMILIES:
        own = () if family.name in COMMON else marks.nightly
        for pad in (0, 3):
            name = f"{family.name}-{'padded' if pad else 'whole'}"
            yield pytest.param(family, torch.float32, pad, marks=own, id=f"{name}-float32-sm90")
    yield pytest.param(FAMILIES[0], torch.bfloat16, 3, id="Llama-padded-bfloat16-sm90")


def run(model, inputs, real, weights):
    model.zero_grad()
    logits = model(**inputs, use_cache=False).logits[real]
    (logits.to(weights.dtype) * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {"logits": logits.detach()}


def steps(model, ids):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        logits = [model(ids[:, :4], **{CACHE: cache}).logits]
        logits += [model(ids[:, [i]], **{CACHE: cache}).logits for i in range(4, ids.shape[1])]
    return {"steps": torch.cat(logits, 1)}


@pytest.mark.parametrize(("family", "dtype", "pad"), list(cases()))
def test_passes_steps_and_gradients(family: Family, dtype, pad):
    found = outcome(family)
    if not found.works:
        pytest.skip(f"refused: {found.refusal}")
    torch.manual_seed(1)
    config = family.config(stablemask=copy.deepcopy(PSEUDO[0 if pad else 1]))
    model = family.model_class(config).to(dtype).eval()
    real = torch.ones(2, LENGTH, dtype=torch.long)
    real[1, :pad] = 0
    ids = torch.randint(3, 61, (2, LENGTH))
    inputs = {"input_ids": ids}
    if pad:
        positions = (real.cumsum(-1) - 1).clamp(min=0)
        inputs |= {"attention_mask": real, "position_ids": positions}
    weights = torch.randn(int(real.sum()), 61)

    def everything(model):
        results = run(model, inputs, real.bool(), weights.to(next(model.parameters()).dtype))
        return results if pad else results | steps(model, ids)

    exact = everything(copy.deepcopy(model).double())
    plain = everything(model)
    with emulated(SM90) as card:
        ours = everything(model)
        assert {name.split()[-1] for name, *_ in card.calls} == {"forward", "backward"}
    assert_no_further_in_norm(ours, plain, exact)
