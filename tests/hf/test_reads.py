"""How often the host waits for the device in a training pass: never more often than in stock attention."""

import copy
import warnings

import pytest
import torch

from tests.cuda_contract import Reads, emulated

from ..models.tiny import tiny_model
from .families import MIXED, WINDOW, Family

SM90 = (9, 0)
LENGTH = 12
MODELS = {
    "Llama": Family("Llama", "LlamaForCausalLM"),
    "Mistral": Family("Mistral", "MistralForCausalLM", WINDOW),
    "Gemma 3": Family("Gemma 3", "Gemma3ForCausalLM", MIXED | {"head_dim": 8}),
}


def call(padding, *, positions):
    """Arguments of a pass: every token real, or ten to the left or right of padding."""
    ids = torch.randint(3, 61, (2, LENGTH))
    mask = torch.ones_like(ids)
    if padding in ("left", "right"):
        mask[0, :2] = 0
        mask = mask if padding == "left" else mask.flip(-1)
    given = {} if padding is None else {"attention_mask": mask}
    if positions or padding == "left":
        given["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": ids, "labels": ids, **given}


def reads(model, inputs):
    """In the second of two passes: the first waits for what is looked at."""
    for _ in range(2):
        with Reads() as counted:
            model(**inputs).loss.backward()
    return counted.count


@pytest.mark.parametrize(("positions", "use_cache"), [(False, True), (True, False)])
@pytest.mark.parametrize("padding", [None, "none", "left", "right"])
@pytest.mark.parametrize("name", [*MODELS, "ours"])
def test_training_reads_no_more_than_stock_attention(name, padding, positions, use_cache):
    inputs = call(padding, positions=positions) | {"use_cache": use_cache}
    family = MODELS[name if name in MODELS else "Llama"]
    stock = family.model_class(family.config(attn_implementation="sdpa"))
    assert stock.config._attn_implementation == "sdpa"
    if name == "ours":  # which tells packed documents apart with `use_cache` too
        model, allowed = tiny_model(), reads(stock, inputs | {"use_cache": False})
    else:
        model = family.model_class(family.config(stablemask={"gamma": 0.1}))
        allowed = reads(stock, inputs)
    if "sliding_window" in family.settings and padding is not None:
        # Whether anything is hidden: stock attention makes a mask of n x n without asking.
        allowed += 1
    with emulated(SM90), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reads(model, inputs) <= allowed


def test_training_is_told_at_the_next_pass_and_all_else_at_once():
    model = MODELS["Llama"].model_class(MODELS["Llama"].config(stablemask={"gamma": 0.1}))
    fine = call("none", positions=False)
    merged = copy.copy(fine) | {"position_ids": torch.arange(LENGTH)[None] % 5}
    ahead = copy.copy(fine) | {"attention_mask": torch.ones(2, 1, LENGTH, LENGTH).bool()}
    with emulated(SM90):
        with pytest.warns(UserWarning, match="each document sees those before it"):
            model(**merged)  # the first pass
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(**fine)
            model(**merged)
        with pytest.warns(UserWarning, match="each document sees those before it"):
            model(**ahead)
        with pytest.raises(ValueError, match="lets a token see later ones"):
            model(**fine)
        model(**fine)
        with torch.no_grad():
            with pytest.raises(ValueError, match="lets a token see later ones"):
                model(**ahead)
            model(**fine)
