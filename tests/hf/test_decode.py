"""Steps of one token: what layers alike share of a step is right in every family, and goes with the step."""

import copy

import pytest
import torch
from transformers import DynamicCache

import stablemask.hf.attention as attention
from stablemask.models.cache import CACHE
from tests.marks import native_library

from .families import FAMILIES, PSEUDO, Family, outcome

EPS = torch.finfo(torch.float32).eps
LENGTH, PROMPT = 17, 4  # the window of those that have one is 5
LLAMA = Family("Llama", "LlamaForCausalLM", {"num_hidden_layers": 4})

pytestmark = pytest.mark.usefixtures("without_gradients")


@pytest.fixture
def without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def shared(monkeypatch):
    """The layers' calls that were known from an earlier layer, as tuples of arguments."""
    calls: list[tuple] = []
    original = attention.repeated_row
    monkeypatch.setattr(
        attention, "repeated_row", lambda *args: calls.append(args) or original(*args)
    )
    return calls


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


def test_all_layers_but_the_first_share_a_step(shared):
    model, ids = build(LLAMA), torch.randint(3, 61, (2, LENGTH))
    truth = model(ids, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    model(ids[:, :-1], **{CACHE: cache})
    assert not shared
    assert_same(model(ids[:, -1:], **{CACHE: cache}).logits, truth[:, -1:])
    assert len(shared) == 3


@native_library
def test_padded_batches_share_it_too_and_are_as_each_text_alone(shared):
    model, ids = build(LLAMA), torch.randint(3, 61, (3, LENGTH))
    padding = (5, 0, 2)
    mask = torch.stack([torch.arange(LENGTH) >= start for start in padding]).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    model(ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1],
          **{CACHE: cache})  # fmt: skip
    logits = model(ids[:, -1:], attention_mask=mask, position_ids=positions[:, -1:],
                   **{CACHE: cache}).logits  # fmt: skip
    assert len(shared) == 3
    assert all(call[-1] is not None for call in shared)
    for row, start in enumerate(padding):
        alone = model(ids[row : row + 1, start:], use_cache=False).logits
        assert_same(logits[row : row + 1], alone[:, -1:])


@pytest.mark.parametrize(
    "change",
    [
        lambda config, positions: config.stablemask.update(gamma=0.02),
        lambda config, positions: config.stablemask.update(shift=-3.0),
        lambda config, positions: positions.add_(2),
    ],
    ids=["gamma", "shift", "positions"],
)
def test_what_changes_between_steps_is_seen(change):
    """With the same tensor of positions in both, on which the first step has left its mass."""
    model, ids = build(LLAMA), torch.randint(3, 61, (1, 1))
    positions = torch.tensor([[0]])
    before = model(ids, position_ids=positions, use_cache=False).logits
    change(model.config, positions)
    after = model(ids, position_ids=positions, use_cache=False).logits
    assert_same(after, model(ids, position_ids=positions.clone(), use_cache=False).logits)
    assert (after - before).abs().max() > 1e-3


def test_a_layer_with_a_gradient_an_autocast_or_its_own_sinks_goes_the_long_way(shared):
    model = build(LLAMA)
    layer, positions = model.model.layers[0].self_attn, torch.tensor([[3]])
    states = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)

    def attend(**given):
        given = {"scaling": 0.3, "position_ids": positions} | given
        return attention.stablemask_attention_forward(layer, *states, None, **given)[0]

    expected = attend()
    assert torch.equal(attend(), expected)
    assert len(shared) == 1
    with torch.autocast("cpu", torch.bfloat16):
        attend()
    with torch.enable_grad():
        torch.testing.assert_close(attend(), expected)
    assert attend(s_aux=torch.ones(4)).sub(expected).abs().max() > 1e-3
    assert attend(sliding_window=2).sub(expected).abs().max() > 1e-3
    torch.testing.assert_close(attend(position_ids=positions.clone()), expected)
    assert len(shared) == 1
    torch.testing.assert_close(attend(sliding_window=4), expected)
    assert len(shared) == 2
