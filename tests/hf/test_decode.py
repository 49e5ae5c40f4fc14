"""Steps of one token are right in every family, and nothing of one step is left for the next."""

import copy
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import stablemask.hf.attention as attention
from stablemask.hf.settings import model_settings
from stablemask.models.cache import CACHE
from stablemask.models.settings import of_layer, pseudo_sink_logits

from .families import FAMILIES, PSEUDO, Family, outcome

EPS = torch.finfo(torch.float32).eps
LENGTH, PROMPT = 17, 4  # the window of those that have one is 5
LLAMA = Family("Llama", "LlamaForCausalLM", {"num_hidden_layers": 4})
SHIFTS = [[0.5, -1.0, 2.0, 0.0], [1.5, -0.5, 0.25, -3.0], [0.25, 1.0, -2.0, 0.125], [4.0] * 4]

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


def build(family, settings=PSEUDO[0]):
    config = family.config(stablemask=copy.deepcopy(settings))
    return family.model_class(config).double().eval()


def assert_same(ours, truth):
    assert (ours - truth).abs().max() < 64 * EPS * truth.abs().max()


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("settings", PSEUDO, ids=["gammas", "horizon"])
def test_steps_equal_one_pass(family, settings):
    with torch.enable_grad():
        found = outcome(family)
    if not found.works:
        pytest.skip(f"refused: {found.refusal}")
    model = build(family, settings)
    ids = torch.randint(3, 61, (2, LENGTH))
    truth = model(ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    logits = [model(ids[:, :PROMPT], **{CACHE: cache}).logits]
    logits += [model(ids[:, i : i + 1], **{CACHE: cache}).logits for i in range(PROMPT, LENGTH)]
    assert_same(torch.cat(logits, 1), truth)


def test_padded_batches_are_as_each_text_alone():
    model, ids = build(LLAMA), torch.randint(3, 61, (3, LENGTH))
    padding = (5, 0, 2)
    mask = torch.stack([torch.arange(LENGTH) >= start for start in padding]).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1],
          **{CACHE: cache})  # fmt: skip
    logits = model(ids[:, -1:], attention_mask=mask, position_ids=positions[:, -1:],
                   **{CACHE: cache}).logits  # fmt: skip
    for row, start in enumerate(padding):
        alone = model(ids[row : row + 1, start:], use_cache=False).logits
        assert_same(logits[row : row + 1], alone[:, -1:])


@pytest.mark.parametrize(
    "change",
    [
        lambda config, positions: config.stablemask.update(gamma=0.02),
        lambda config, positions: config.stablemask.update(shift=-3.0),
        lambda config, positions: config.stablemask["shift"][1].__setitem__(2, -3.0),
        lambda config, positions: positions.add_(2),
        lambda config, positions: positions.data.add_(2),
        lambda config, positions: np.add(positions.numpy(), 2, out=positions.numpy()),
    ],
    ids=["gamma", "shift", "one shift", "positions", "data", "numpy"],
)
@pytest.mark.parametrize("length", [1, 3])
def test_what_changes_between_steps_is_seen(change, length):
    """With the same tensor of positions in both."""
    settings = PSEUDO[0] | {"shift": [[0.5, -1.0, 2.0, 0.0]] * 4}
    model, ids = build(LLAMA, settings), torch.randint(3, 61, (1, length))
    positions = torch.arange(length)[None]
    before = model(ids, position_ids=positions, use_cache=False).logits
    change(model.config, positions)
    after = model(ids, position_ids=positions, use_cache=False).logits
    assert_same(after, model(ids, position_ids=positions.clone(), use_cache=False).logits)
    assert (after - before).abs().max() > 1e-3


def test_a_layer_with_a_gradient_an_autocast_or_its_own_sinks_is_right():
    layer, positions = build(LLAMA).model.layers[0].self_attn, torch.tensor([[3]])
    states = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)

    def attend(**given):
        given = {"scaling": 0.3, "position_ids": positions} | given
        return attention.stablemask_attention_forward(layer, *states, None, **given)[0]

    expected = attend()
    with torch.autocast("cpu", torch.bfloat16):
        assert attend().dtype == torch.bfloat16
    with torch.enable_grad():
        torch.testing.assert_close(attend(), expected)
    assert attend(s_aux=torch.ones(4)).sub(expected).abs().max() > 1e-3
    assert attend(sliding_window=2).sub(expected).abs().max() > 1e-3
    torch.testing.assert_close(attend(sliding_window=4), expected)
    states = tuple(torch.randn(1, heads, 2, 8) for heads in (4, 2, 2))
    with pytest.raises(ValueError, match="asked for is_causal=False"):
        attend(is_causal=False, position_ids=torch.arange(2)[None])


def test_layers_of_one_pass_share_what_the_first_found(monkeypatch):
    """Not those of another pass, which may begin at any layer, nor of another model."""
    looked_up = Mock(wraps=attention.sink_logits_at)
    monkeypatch.setattr(attention, "sink_logits_at", looked_up)
    model, other = build(LLAMA), build(LLAMA)
    positions, query = torch.tensor([[3]]), torch.empty(1, 4, 1, 8)

    def logits(number, model=model):
        layer = model.model.layers[number].self_attn
        return attention.layer_sink_logits(layer, query, 8, None, position_ids=positions)

    before = [logits(number) for number in (1, 2, 3)]
    assert looked_up.call_count == 1
    assert all(torch.equal(of_layer, before[0]) for of_layer in before)
    positions.add_(1)
    after = [logits(number) for number in (3, 1, 2)]
    assert looked_up.call_count == 3
    assert all(torch.equal(of_layer, after[0]) for of_layer in after)
    assert not torch.equal(after[0], before[0])
    other.config.stablemask["shift"] = 1.0
    torch.testing.assert_close(logits(3, other), after[0] + 1.0)
    model.config.stablemask["shift"] = 2.0
    torch.testing.assert_close(logits(3), after[0] + 2.0)


def test_nothing_is_kept_on_the_tensors_of_a_batch(tmp_path):
    """So that it can be saved, and loaded without running anything."""
    model, ids = build(LLAMA), torch.randint(3, 61, (2, 5))
    mask = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5).clone()
    batch = {"input_ids": ids, "position_ids": torch.arange(5)[None], "attention_mask": mask}
    logits = model(**batch).logits
    torch.save(batch, tmp_path / "batch.pt")
    loaded = torch.load(tmp_path / "batch.pt", weights_only=True)
    assert torch.equal(model(**loaded).logits, logits)
    assert not any(vars(tensor) for tensor in batch.values())

    mask.data[:, :, 1, 3] = True
    with pytest.raises(ValueError, match="the mask lets a token see later ones"):
        model(**batch)


@pytest.mark.parametrize(
    "settings",
    [
        {"gamma": 0.1},
        {"gamma": [0.3, 0.1, 0.05, 0.2], "horizon": 20},
        {"gamma": "slopes", "hold": 9, "start": 14, "floor": 0.5, "shift": -1.0},
        {"gamma": 0.1, "hold": None},
        {"gamma": 1e-7, "hold": 2**30},
        {"gamma": [0.3, 0.1, 0.05, 0.0], "horizon": 20, "hold": 12},
        {"gamma": "slopes", "horizon": 14, "suffix": True},
        {"gamma": "slopes", "horizon": 14, "suffix": True, "hold": 63},
        {"gamma": 0.1, "hold": 9, "start": 3, "shift": SHIFTS},
        {"gamma": 1e-3, "hold": 2**18, "shift": SHIFTS},  # a table of each layer would be too large
    ],
)
def test_the_mass_of_any_position_is_that_of_its_closed_form(settings):
    model = build(LLAMA, settings)
    layer, query = model.model.layers[2].self_attn, torch.empty(2, 4, 8, 8)
    positions = torch.tensor([[0, 1, 9, 10, 13, 14, 18, 19], [12, 20, 21, 63, 64, 65, 999, 7]])
    complete = model_settings(model.config)
    expected = pseudo_sink_logits(of_layer(complete, 2), 4, positions).expand(2, 4, 8)
    with torch.inference_mode():  # what is made here serves training too
        attention.layer_sink_logits(layer, query, 8, None, position_ids=positions)
    found = attention.layer_sink_logits(layer, query, 8, None, position_ids=positions)
    assert torch.equal(found.expand(2, 4, 8), expected)
    found = attention.layer_sink_logits(layer, query, 8, None, position_ids=positions.int())
    assert torch.equal(found.expand(2, 4, 8), expected)
    for column, position in enumerate(positions[1]):
        row = attention.layer_sink_logits(
            layer, query[:1, :, :1], 8, None, position_ids=position.view(1, 1)
        )
        assert torch.equal(row.expand(1, 4, 1), expected[1:, :, column, None])
    with pytest.raises(TypeError, match="must be an integer tensor"):
        attention.layer_sink_logits(layer, query, 8, None, position_ids=positions.double())
    with torch.enable_grad():
        (found + torch.ones(1, requires_grad=True)).nan_to_num(neginf=0).sum().backward()
