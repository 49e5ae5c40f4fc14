"""The biases that stand for the prefix: the student is its teacher, to rounding, where they can be."""

import pytest
import torch
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3Config, Qwen3ForCausalLM

from stablemask.hf import load_model
from stablemask.training.adapting.adapt import make_stablemask, settle
from stablemask.training.adapting.biases import give_biases, steady_dimensions
from stablemask.training.adapting.calibration import calibrate
from stablemask.training.adapting.reading import Reading
from stablemask.training.adapting.watch import Pass, Watch, softmax, with_fading_value

from .models import MODELS, PREFIX, SIZES, cohere, llama, options, texts


def prepared(**settings):
    model = llama(**settings).double()
    make_stablemask(model, options(gamma=0.1, hold=0))
    ids = texts(3, 12)[1:]  # the first begins with the prefix
    return model, ids, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("own", [False, True], ids=["no biases before", "biases before"])
def test_where_nothing_rotates_the_student_is_its_teacher(own, tmp_path):
    """The whole key is in the biases then, and what is left to the constant is a score of 0."""
    model, ids, batch = prepared(attention_bias=own)
    model.model.rotary_emb.inv_freq.zero_()
    calibration = calibrate(model, Watch(model), [batch], PREFIX, steady_dimensions(model, 12))
    with torch.no_grad(), Watch(model).over(softmax, None):
        goal = model(Reading.of(ids, PREFIX).teacher).logits[:, 1:]
    settle(model, calibration)
    torch.testing.assert_close(model(ids).logits, goal, rtol=1e-5, atol=1e-5)

    model.save_pretrained(tmp_path)
    found = load_model(str(tmp_path), dtype=torch.float64)
    found.model.rotary_emb.inv_freq.zero_()
    assert torch.equal(found(ids).logits, model(ids).logits)


def test_the_value_alone_is_exact_where_every_dimension_rotates():
    model, ids, batch = prepared()
    calibration = calibrate(model, Watch(model), [batch], PREFIX, torch.zeros(8, dtype=torch.bool))
    model.config.stablemask["shift"] = calibration.shifts.tolist()
    real = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        with Watch(model).over(with_fading_value, Pass(real, 1.0, calibration.values, {})):
            goal = model(ids).logits
        give_biases(model, calibration)
        torch.testing.assert_close(model(ids).logits, goal, rtol=1e-5, atol=1e-5)


def qwen3():
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8))


def gpt_oss():
    return GptOssForCausalLM(
        GptOssConfig(**SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
    )


@pytest.mark.parametrize(
    ("name", "context", "steady"),
    [
        ("llama", 12, [2, 3, 6, 7]),  # of 1, 0.1, 0.01, 0.001 radians a position
        ("llama", 64, [3, 7]),
        ("cohere", 12, [2, 3, 4, 5, 6, 7]),  # of 1, 0.04, ..., its halves alternate
        ("qwen3", 12, []),  # normalises keys
        ("windowed", 12, None),  # Mistral: no biases
        ("ours", 12, None),
        ("gpt_oss", 12, None),  # its own sinks take a share too
    ],
)
def test_what_biases_can_take_over_is_read_off_the_model(name, context, steady):
    model = (MODELS | {"cohere": cohere, "qwen3": qwen3, "gpt_oss": gpt_oss})[name]()
    make_stablemask(model, options(gamma=0.1))
    found = steady_dimensions(model, context)
    assert (None if found is None else found.nonzero().flatten().tolist()) == steady
