"""Int8 linear maps against integers rounded by hand."""

import copy
import sys

import pytest
import torch
from torch import nn

from stablemask.errors import InputError
from stablemask.evaluation.quantization import quantize_int8

from .. import marks
from ..models.tiny import random_ids, tiny_model
from .test_activations import tiny_gpt2, tiny_llama


def rounded(values, scale):
    return (values / scale).round().clamp(-128, 127) * scale


def check_int8_linear(quantised, linear, inputs, input_scale):
    """A value half way between two integers may go either way, so few elements differ a little."""
    weight_scale = linear.weight.abs().amax(dim=1, keepdim=True) / 127.5
    expected = rounded(inputs, input_scale) @ rounded(linear.weight, weight_scale).T
    rounding_error = (expected - linear(inputs)).norm()
    assert (quantised(inputs) - expected).norm() < rounding_error / 10


def inputs_with_an_outlier():
    inputs = torch.randn(2, 9, 32)
    inputs[0, 0, 5] = 300.0
    return inputs


@marks.torchao
@torch.no_grad()
def test_dynamic_scales_are_those_of_each_token():
    model, inputs = tiny_llama(), inputs_with_an_outlier()
    linear = copy.deepcopy(model.model.layers[1].mlp.up_proj)
    quantised = quantize_int8(model).model.layers[1].mlp.up_proj
    check_int8_linear(quantised, linear, inputs, inputs.abs().amax(dim=-1, keepdim=True) / 127.5)


@marks.torchao
@torch.no_grad()
def test_static_scales_are_those_of_the_calibration():
    model, ids, seen = tiny_llama(), random_ids(3, 16), []
    original = model.model.layers[1].mlp.up_proj
    linear = copy.deepcopy(original)
    hook = original.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().max()))
    model(ids)
    hook.remove()
    quantised = quantize_int8(model, "static", ids).model.layers[1].mlp.up_proj
    check_int8_linear(quantised, linear, torch.randn(2, 9, 32), seen[0] / 127)
    # What is larger than anything seen is cut to it.
    check_int8_linear(quantised, linear, inputs_with_an_outlier(), seen[0] / 127)


@marks.torchao
@torch.no_grad()
@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_model])
def test_the_logits_stay_close_and_the_head_is_left_alone(make, activations):
    model, ids = make(), random_ids(4, 16)
    expected = model(ids).logits
    quantised = quantize_int8(copy.deepcopy(model), activations, ids)
    assert type(quantised.lm_head.weight) is nn.Parameter
    error = (quantised(ids).logits - expected).norm() / expected.norm()
    assert 1e-5 < error < 0.1


@marks.torchao
@pytest.mark.parametrize(
    ("make", "arguments", "words"),
    [
        (tiny_gpt2, (), r"GPT2LMHeadModel has no nn.Linear in its decoder layers"),
        (tiny_llama, ("both",), "dynamic or static, got 'both'"),
        (tiny_llama, ("static",), "need calibration ids"),
        (tiny_llama, ("static", torch.ones(16, dtype=torch.long)), r"got \(16,\)"),
        (tiny_llama, ("static", torch.full((1, 4), 61)), "token id 61"),
    ],
)
def test_bad_arguments(make, arguments, words):
    with pytest.raises(InputError, match=words):
        quantize_int8(make(), *arguments)


def test_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[quant\]'"):
        quantize_int8(tiny_llama())
