"""The schedule by which the pseudo mass comes in, and what it comes into."""

import math
from pydoc_data.topics import topics

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    TrainerControl,
    TrainerState,
)

from stablemask import head_decay_rates, pseudo_logsumexp
from stablemask.data import load_tokenizer
from stablemask.errors import InputError
from stablemask.hf import apply_stablemask, load_model
from stablemask.training.adapt import ShiftSchedule, adapt, harmless_shift
from stablemask.training.options import FinetuneOptions

from .. import marks
from ..models.tiny import random_ids, tiny_model


def held_out(rows: int, length: int, model=None) -> dict[str, torch.Tensor]:
    """A batch to find shifts with; its labels are what ``model`` says itself, else its tokens."""
    ids = random_ids(rows, length)
    labels = ids.clone()
    if model is not None:
        labels[:, 1:] = model(ids).logits[:, :-1].argmax(-1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def options(**changes) -> FinetuneOptions:
    settings = {"model": "m", "data": "d", "out": "o", "steps": 10, "shift_steps": 6, "adapt": True}
    return FinetuneOptions(**(settings | changes))


@pytest.mark.parametrize(
    ("to", "shifts"),
    [(0.0, [-20, -16, -12, -8, -4, 0, 0, 0]), (-5.0, [-20, -17, -14, -11, -8, -5, -5, -5])],
)
def test_the_shift_rises_by_the_same_amount_each_step_and_goes_at_0(to, shifts):
    settings = {"gamma": 0.1, "horizon": None}
    schedule = ShiftSchedule(settings, -20.0, to, 5)
    state, control = TrainerState(), TrainerControl()
    seen = []
    for step in range(8):
        state.global_step = step
        if step in (0, 3):  # a run begins, or is gone on with
            schedule.on_train_begin(None, state, control)
        else:
            schedule.on_step_end(None, state, control)
        logs: dict[str, float] = {"loss": 1.0}
        schedule.on_log(None, state, control, logs=logs)
        assert settings.get("shift", 0.0) == logs["shift"]
        seen.append(logs["shift"])
    assert seen == pytest.approx(shifts)
    assert settings == {"gamma": 0.1, "horizon": None} | ({"shift": to} if to else {})


def test_the_mass_may_be_there_at_once():
    assert ShiftSchedule({}, -20.0, -5.0, 0).shift_at(0) == -5.0


def neox(scale: float):
    config = GPTNeoXConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, initializer_range=scale,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config).eval()


@pytest.mark.parametrize("scale", [0.02, 1.0])
@pytest.mark.parametrize("start", [0, 1])
def test_adapting_starts_from_the_very_model(scale, start, tmp_path):
    torch.manual_seed(0)
    model = neox(scale)
    model.save_pretrained(tmp_path)
    batch = held_out(3, 17)
    batch["attention_mask"][1, 9:] = 0  # padded on the right
    batch["labels"][1, 9:] = -100
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)(batch["input_ids"][:1]).logits
    schedule = adapt(model, options(start=start), batch)
    schedule.on_train_begin(None, TrainerState(), TrainerControl())
    assert torch.equal(model(batch["input_ids"][:1]).logits, expected)
    assert schedule.shift_from < 0
    assert schedule.shift_from % 8 == 0
    # Nor is the shift lower than it must be.
    schedule.settings["shift"] = schedule.shift_from + 8
    raised = model(**batch).logits
    schedule.settings["shift"] = -500.0
    assert not torch.equal(raised, model(**batch).logits)


def test_a_row_that_scores_itself_low_needs_a_lower_shift_than_the_rest():
    """A first row that sees itself alone at -40 gives all its attention away to a small mass."""
    torch.manual_seed(0)
    model = tiny_model(attention="softmax", position_encoding="nope")
    for layer in model.model.layers:
        with torch.no_grad():
            # Keys turned against their own queries: every row scores itself below the others.
            heads, width = model.config.num_attention_heads, model.config.head_dim
            query = layer.self_attn.q_proj.weight.view(heads, width, -1)
            layer.self_attn.k_proj.weight.copy_(-3 * query[::2].reshape(-1, query.shape[-1]))
    batch = {"input_ids": random_ids(2, 9)}
    apply_stablemask(model, gamma=0.1)
    everywhere = harmless_shift(model, batch)
    apply_stablemask(model, gamma=0.1, start=1)
    after_the_first = harmless_shift(model, batch)
    assert everywhere < after_the_first


def test_a_shift_that_is_given_is_taken():
    batch = held_out(1, 9)
    schedule = adapt(
        neox(0.02), options(shift_from=-3.0, shift_to=0.0, gamma="slopes", horizon=64), batch
    )
    assert (schedule.shift_from, schedule.shift_to) == (-3.0, 0.0)
    assert adapt(neox(0.02), options(shift_to=-300.0), batch).shift_from == -300.0
    assert adapt(neox(0.02), options(shift_to=-4.0, shift_steps=0), batch).shift_from == -4.0
    assert schedule.settings["gamma"] == "slopes"
    assert schedule.settings["horizon"] == 64


def even(score: float, sharpness: float = 1.0):
    """A model in which every token scores every other alike."""
    config = OPTConfig(
        vocab_size=61, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, tie_word_embeddings=False, init_std=0.3,
    )  # fmt: skip
    model = OPTForCausalLM(config).eval()
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            attention = layer.self_attn
            for linear in (attention.q_proj, attention.k_proj):
                linear.weight.zero_()
                linear.bias.fill_(
                    (score / 8**0.5) ** 0.5
                )  # head_dim is 8: the score is 8 bias^2 / sqrt 8
        model.lm_head.weight.mul_(sharpness)
    return model


@pytest.mark.parametrize("score", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("gamma", [0.01, 0.2, "slopes"])
def test_the_mass_is_made_as_large_as_the_scores_on_the_first_token(score, gamma):
    model = even(score, sharpness=0.0)  # whose loss is the same whatever its attention does
    schedule = adapt(model, options(gamma=gamma, hold="never"), held_out(2, 16))
    rates = head_decay_rates(4) if gamma == "slopes" else gamma
    log_mass = pseudo_logsumexp(torch.arange(1, 16), rates)  # of the rows after the first
    expected = min(0.0, math.floor(2 * (score - log_mass).median().item() + 1e-4) / 2)
    assert schedule.shift_to == expected
    assert schedule.shift_from <= expected


def test_the_mass_is_no_larger_than_the_model_can_bear_at_once():
    model = even(3.0, sharpness=20.0)
    batch = held_out(2, 32, model)
    plain = model(**batch).loss.item()
    schedule = adapt(model, options(), batch)

    def rise(shift: float) -> float:
        model.config.stablemask["shift"] = shift
        return model(**batch).loss.item() - plain

    assert rise(schedule.shift_to) <= 0.25 < rise(schedule.shift_to + 0.5)
    log_mass = pseudo_logsumexp(torch.arange(1, 32), 1 / 64)
    assert (
        schedule.shift_to < (3.0 - log_mass).median() - 0.5
    )  # the scores alone would have been too much
    # A finite horizon of one column leaves no mass to shift.
    assert adapt(even(3.0), options(horizon=1), batch).shift_to == 0


def test_a_first_shift_above_what_the_scores_ask_for_is_refused():
    with pytest.raises(
        InputError, match=r"shift_from \(-0.1\) is above the -.* give shift_to as well"
    ):
        adapt(even(0.0), options(shift_from=-0.1, gamma=0.01), held_out(1, 9))


@pytest.mark.parametrize("hold", [None, 40, "never"])
def test_how_long_the_mass_falls_can_be_chosen(hold):
    model = neox(0.02)
    stands = {None: model.config.max_position_embeddings - 1, "never": None}.get(hold, hold)
    schedule = adapt(model, options(hold=hold), held_out(1, 9))
    assert schedule.settings["hold"] == stands


def test_our_own_softmax_model_can_be_adapted(tmp_path):
    model = tiny_model(attention="softmax")
    batch = held_out(2, 9)
    input_ids = batch["input_ids"]
    expected = model(input_ids).logits
    schedule = adapt(model, options(shift_to=0.0), batch)
    schedule.on_train_begin(None, TrainerState(), TrainerControl())
    assert torch.equal(model(input_ids).logits, expected)
    model.config.stablemask.pop("shift")
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.config.attention == "stablemask"
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    assert not torch.allclose(loaded(input_ids).logits, expected)


def bloom():
    return BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=4))


@pytest.mark.parametrize(
    ("model", "changes", "match"),
    [
        (bloom, {"gamma": 0.1}, "Bloom.* compute their attention themselves"),
        (tiny_model, {}, "no softmax model"),
        (lambda: tiny_model(attention="learned-sink"), {}, "no softmax model"),
        (lambda: apply_stablemask(neox(0.02), gamma=0.1), {}, "no softmax model"),
        (lambda: neox(0.02), {"gamma": 0.0}, "gamma"),
        (lambda: neox(0.02), {"gamma": "fast"}, "gamma"),
        (lambda: neox(0.02), {"horizon": 0}, "horizon"),
        (lambda: neox(0.02), {"hold": "often"}, "hold"),
    ],
)
@pytest.mark.parametrize("shift_steps", [0, 6])
def test_what_cannot_be_adapted_says_so(model, changes, match, shift_steps):
    with pytest.raises(InputError, match=match):
        adapt(model(), options(shift_steps=shift_steps, **changes), held_out(1, 5))


@marks.nightly
def test_a_real_model_bears_the_mass_that_is_chosen_for_it(smollm2_folder):
    """SmolLM2-135M, which nobody tuned anything for: the whole mass would ruin it."""
    model = load_model(str(smollm2_folder))
    text = "\n".join(topics[name] for name in ("lists", "strings", "numbers", "class"))
    ids = torch.tensor(load_tokenizer(str(smollm2_folder))(text).input_ids[:1024]).view(2, 512)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    with torch.no_grad():
        plain = model(**batch).loss
        schedule = adapt(model, options(), batch)
        losses = []
        for shift in (schedule.shift_from, schedule.shift_to, 0.0):
            schedule.settings["shift"] = shift
            losses.append(model(**batch).loss - plain)
    assert losses[0] == 0
    assert losses[1] <= 0.25
    assert losses[2] > 5
    # As large as its sink, or nearly: log M of 9 without the shift, scores of 2 to 5 in most layers.
    assert -8 <= schedule.shift_to <= -5
