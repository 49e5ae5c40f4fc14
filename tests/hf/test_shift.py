"""A shift of each layer and head: given as lists or trained, it is what the definition says, everywhere."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from stablemask.hf import apply_stablemask, keep_shifts, read_shifts, train_shifts
from stablemask.models import mass
from stablemask.models.settings import SHIFT_PARAMETER

from ..models.tiny import tiny_model
from .dense import densely
from .families import MIXED, SIZES, Family

LLAMA = Family("Llama", "LlamaForCausalLM")
GEMMA = Family("Gemma 3", "Gemma3ForCausalLM", MIXED | {"head_dim": 8})
SHIFTS = [[0.5, -1.0, 2.0, 0.0], [1.5, -0.5, 0.25, -3.0]]
MASS = {"gamma": 0.05, "horizon": None, "hold": 9}
EPS = torch.finfo(torch.float32).eps
LENGTH = 14  # past the hold, and past the window of Gemma's first layer


def random_ids(*shape):
    return torch.randint(3, 61, shape)


def build(family, **shift):
    settings = copy.deepcopy(MASS | shift)
    if family is None:
        return tiny_model(torch.float64, max_position_embeddings=64, stablemask=settings)
    return family.model_class(family.config(stablemask=settings)).double().eval()


def definition(family, model):
    """A stock model with the same weights, whose eager attention can be made the definition."""
    if family is None:  # our decoder has the layers of a Llama
        config = LlamaConfig(**SIZES, rms_norm_eps=1e-6, attn_implementation="eager")
        exact = LlamaForCausalLM(config)
    else:
        exact = family.model_class._from_config(family.config(), attn_implementation="eager")
    weights = {k: v for k, v in model.state_dict().items() if SHIFT_PARAMETER not in k}
    exact.double().eval().load_state_dict(weights)
    return exact


FAMILIES = pytest.mark.parametrize("family", [LLAMA, GEMMA, None], ids=["Llama", "Gemma 3", "ours"])


@FAMILIES
def test_a_trained_shift_has_the_gradient_of_the_definition_and_is_kept_to_the_bit(
    family, tmp_path
):
    model, ids = build(family, shift=0.25), random_ids(2, LENGTH)
    with torch.no_grad():
        before = model(ids).logits
        parameters = train_shifts(model)
        assert torch.equal(model(ids).logits, before)
    assert [p.tolist() for p in parameters] == [[0.25] * 4] * 2
    named = {n: p for n, p in model.named_parameters() if n.endswith("." + SHIFT_PARAMETER)}
    assert list(named.values()) == parameters
    assert {p.dtype for p in parameters} == {torch.float32}
    with torch.no_grad():
        for parameter, row in zip(parameters, SHIFTS):
            parameter.copy_(torch.tensor(row) + 0.1)  # no number that float32 holds by chance

    weights = torch.randn(2, LENGTH, 61, dtype=torch.float64)
    logits = model(ids, use_cache=False).logits
    (logits * weights).sum().backward()
    shifts = [p.detach().double().requires_grad_() for p in parameters]
    exact = definition(family, model)
    with densely(exact, torch.arange(LENGTH)[None], MASS | {"shift": shifts}):
        truth = exact(ids, use_cache=False).logits
    (truth * weights).sum().backward()
    assert (logits - truth).abs().max() < 64 * EPS * truth.abs().max()
    largest = max(shift.grad.abs().max() for shift in shifts)
    for parameter, shift in zip(parameters, shifts):
        assert (parameter.grad - shift.grad).abs().max() < 64 * EPS * largest
        assert shift.grad.abs().min() > 0

    kept = read_shifts(model)
    assert model.config.stablemask["shift"] == 0.25
    model.save_pretrained(tmp_path / "meanwhile")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "meanwhile").double()
    assert (saved(ids).logits - logits).abs().max() < 64 * EPS * logits.abs().max()
    assert list(named) == [n for n, _ in model.named_parameters() if SHIFT_PARAMETER in n]
    keep_shifts(model)
    assert model.config.stablemask == MASS | {"shift": kept}
    assert torch.equal(model(ids, use_cache=False).logits, logits)
    assert not any(SHIFT_PARAMETER in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).double()
    assert read_shifts(again) == kept == [p.tolist() for p in parameters]
    with densely(exact, torch.arange(LENGTH)[None], MASS | {"shift": kept}):
        truth = exact(ids, use_cache=False).logits
    assert (again(ids).logits - truth).abs().max() < 64 * EPS * truth.abs().max()


@pytest.mark.parametrize(
    "hold", [0, 9, 2**18]
)  # of the last a table of each layer would be too large
def test_a_step_of_decoding_makes_no_table_anew_however_many_layers_there_are(hold, monkeypatch):
    layers = 40
    family = Family("deep", "LlamaForCausalLM", {"num_hidden_layers": layers})
    model = build(family, hold=hold, shift=[[n / 4, -1.0, n % 3, 0.5] for n in range(layers)])
    steps = [torch.tensor([[position]]) for position in (3, 4)]
    with torch.no_grad():
        model(steps[0], position_ids=steps[0], use_cache=False)
        monkeypatch.setattr(mass, "_table", None)
        model(steps[1], position_ids=steps[1], use_cache=False)


def test_what_cannot_have_a_shift_of_each_layer_is_left_as_it_was():
    model = LLAMA.model_class(LLAMA.config())
    with pytest.raises(ValueError, match="LlamaForCausalLM runs no StableMask"):
        train_shifts(model)
    del model.model.layers[1].self_attn.layer_idx
    with pytest.raises(ValueError, match=r"do not tell which layer they are in \(layer_idx\)"):
        apply_stablemask(model, shift=SHIFTS)
    assert getattr(model.config, "stablemask", None) is None
    apply_stablemask(model, shift=1.0)

    model = build(LLAMA)
    with torch.no_grad():
        train_shifts(model)[1][2] = float("nan")
    with pytest.raises(ValueError, match=r"finite number .* nan, 0\.0\] for layer 1"):
        keep_shifts(model)
    assert model.config.stablemask == MASS
    assert model.model.layers[1].self_attn.stablemask_shift is not None
    with pytest.raises(ValueError, match=r"in training: call keep_shifts\(model\) first"):
        apply_stablemask(model, shift=-3.0)
    assert model.config.stablemask == MASS
