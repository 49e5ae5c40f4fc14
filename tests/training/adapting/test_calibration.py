"""The mass that takes the prefix's place: what it is where it is known, and what is kept of it."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from transformers import BloomConfig, BloomForCausalLM

from stablemask import pseudo_logsumexp
from stablemask.errors import InputError
from stablemask.hf import apply_stablemask
from stablemask.training.adapting.adapt import find_prefix, make_stablemask
from stablemask.training.adapting.calibration import FILE, Calibration, calibrate
from stablemask.training.adapting.reading import Reading
from stablemask.training.adapting.table import _ROWS, table
from stablemask.training.adapting.watch import Pass, Recorded, Watch, record, with_fading_value

from ...models.tiny import tiny_model
from .models import PREFIX, llama, options, softmax_with_settings, texts


def batch(ids: torch.Tensor, padded: int = 0) -> dict[str, torch.Tensor]:
    mask = torch.ones_like(ids)
    if padded:
        mask[-1, -padded:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def indifferent(**settings):
    """A model in which every token scores every other alike."""
    model = llama(attention_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                linear.weight.zero_()
                linear.bias.zero_()
    make_stablemask(model, options(**settings))
    return model


@pytest.mark.parametrize("prefix", [PREFIX, None])
@pytest.mark.parametrize("gamma", [0.01, 0.2])
def test_the_mass_is_made_as_large_as_the_scores_on_the_prefix(prefix, gamma):
    model = indifferent(gamma=gamma, hold="never")
    ids = texts(3, 9)
    calibration = calibrate(model, Watch(model), [batch(ids[:2]), batch(ids[2:])], prefix)
    rows = [
        row for text in ids.tolist() for row in range(9) if row or prefix not in (None, text[0])
    ]
    log_mass = pseudo_logsumexp(torch.tensor(rows), gamma)
    torch.testing.assert_close(
        calibration.shifts, (-log_mass).median().expand(2, 4), rtol=1e-5, atol=1e-5
    )


def test_where_scores_are_constant_and_the_value_is_kept_the_student_is_its_teacher():
    """Before any training; with the decay held, log M is constant as well."""
    model = indifferent(gamma=0.1, hold=0)
    ids = texts(3, 12)[1:]
    watch = Watch(model)
    calibration = calibrate(model, watch, [batch(ids)], PREFIX)
    goal = model(Reading.of(ids, PREFIX).teacher).logits[:, 1:]
    model.config.stablemask["shift"] = calibration.shifts.tolist()
    real = torch.ones_like(ids, dtype=torch.bool)
    with watch.over(with_fading_value, Pass(real, 1.0, calibration.values, {})):
        torch.testing.assert_close(model(ids).logits, goal)
    assert not torch.allclose(model(ids).logits, goal, atol=0.05)


@pytest.mark.parametrize("name", ["llama", "windowed", "ours"])
def test_each_head_has_the_median_of_its_own_scores_over_real_rows(name):
    torch.manual_seed(0)
    model = softmax_with_settings(name, gamma=0.05)
    ids = texts(3, 10)
    found = calibrate(model, Watch(model), [batch(ids, padded=4)], PREFIX)
    over: list[list[torch.Tensor]] = [[], []]
    for row, text in enumerate(ids):  # one at a time, without padding
        length = 6 if row == 2 else 10
        read = text[:length] if row == 0 else torch.cat((torch.tensor([PREFIX]), text[:length]))
        with torch.no_grad(), Watch(model).over(record, Recorded()) as seen:
            model(read[None])
        log_mass = pseudo_logsumexp(torch.arange(length), 0.05).double()
        for layer, scores in seen.scores.items():
            own = scores[0, :, -length:] - log_mass
            over[layer].append(own[:, 1:] if row == 0 else own)
    for layer in range(2):
        whole = torch.cat(over[layer], 1)
        for head in range(4):
            rows = whole[head][whole[head].isfinite()]
            torch.testing.assert_close(found.shifts[layer, head], rows.median().float())
    assert found.values[0].shape == (2, 8)
    assert (found.ordinary > 0).all()


def test_it_is_kept_to_the_bit(tmp_path):
    values, keys = ({0: torch.randn(2, 8), 1: torch.randn(2, 8)} for _ in range(2))
    made = Calibration(torch.randn(2, 4), values, keys, torch.rand(2), {"steps": 7})
    made.save(tmp_path)
    found = Calibration.load(tmp_path)
    assert torch.equal(found.shifts, made.shifts)
    assert torch.equal(found.ordinary, made.ordinary)
    for layer in (0, 1):
        assert torch.equal(found.values[layer], made.values[layer])
        assert torch.equal(found.keys[layer], made.keys[layer])
    assert found.notes == {"steps": 7}
    (tmp_path / FILE).write_bytes(b"else")
    with pytest.raises(InputError, match="is damaged"):
        Calibration.load(tmp_path)


def test_what_is_not_finite_is_kept_as_json_and_read_again(tmp_path):
    before = {"as it was": dict.fromkeys(_ROWS, math.inf)}
    prefix = {"token": 5, "text": "<s>", "losses": {"": math.nan, "<s>": 3.5}}
    notes = {"steps": 7, "prefix": prefix, "before": before}
    Calibration(torch.randn(2, 4), {}, {}, torch.rand(2), notes).save(tmp_path)
    with safe_open(tmp_path / FILE, "pt") as file:
        json.loads(file.metadata()["notes"], parse_constant=lambda name: pytest.fail(name))
    assert "not finite |" in table(Calibration.load(tmp_path).notes["before"])
    found = find_prefix(llama(), None, None, options(), tmp_path)
    assert str(found) == "<s>: the model's loss on a text is 3.500 after it, nan without"


def test_a_model_without_a_mass_is_the_very_model():
    model = tiny_model(attention="softmax")
    ids = texts(2, 9)
    expected = model(ids).logits
    make_stablemask(model, options(gamma=0.01, start=1))
    assert torch.equal(model(ids).logits, expected)
    assert model.config.stablemask["start"] == 1


def bloom():
    return BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=4))


@pytest.mark.parametrize(
    ("model", "changes", "match"),
    [
        (bloom, {"gamma": 0.1}, "Bloom.* compute their attention themselves"),
        (tiny_model, {}, "no softmax model"),
        (lambda: tiny_model(attention="learned-sink"), {}, "no softmax model"),
        (lambda: apply_stablemask(llama(), gamma=0.1), {}, "no softmax model"),
        (llama, {"gamma": 0.0}, "gamma"),
        (llama, {"gamma": "fast"}, "gamma"),
        (llama, {"horizon": 0}, "horizon"),
        (llama, {"horizon": 1}, "leave no row a pseudo mass"),
        (llama, {"hold": "often"}, "hold"),
    ],
)
def test_what_cannot_be_adapted_says_so(model, changes, match):
    with pytest.raises(InputError, match=match):
        make_stablemask(model(), options(**changes))
