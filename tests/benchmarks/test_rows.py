"""Every row against its definition, the check itself against the tests' oracle, and masks."""

import dataclasses

import pytest
import torch

from benchmarks import correctness, masks
from benchmarks.cases import HEADS, Case, Inputs, make_inputs
from benchmarks.measure import CannotServeError, prepare
from benchmarks.rows import all_rows
from tests import marks
from tests.oracle import sink_definition, stable_mask_definition

ROWS = all_rows("cpu")
SQUARE = Case("cpu", "float32", 2, 70, 70, 16, 4)
DECODE = Case("cpu", "float32", 2, 1, 70, 16, 4)
# What compiles or needs a package that may not be here has a test of its own.
PLAIN = [name for name, row in ROWS.items() if row.package is None and not row.compiled]


def exact(case, name):
    """The definition of a row in float64, and what the check takes for it."""
    inputs = Inputs(*(tensor.detach().double() for tensor in make_inputs(case)))
    rows = torch.arange(case.q_len)
    return inputs, correctness.define(case, ROWS[name], inputs, rows)


@pytest.mark.parametrize("case", [SQUARE, DECODE])
def test_the_checks_definition_is_that_of_the_tests(case):
    inputs, found = exact(case, "learned sink")
    torch.testing.assert_close(found, sink_definition(*inputs[:3], inputs.sinks.view(-1, 1)))
    inputs, found = exact(case, "sdpa")
    torch.testing.assert_close(found, sink_definition(*inputs[:3], torch.tensor(-torch.inf)))
    if case is SQUARE:
        inputs, found = exact(case, "definition")
        paper = stable_mask_definition(*inputs[:3], case.gamma, case.horizon)
        torch.testing.assert_close(found, paper)
        inputs, found = exact(case, "stablemask")
        paper = stable_mask_definition(*inputs[:3], case.gamma, 60 * case.kv_len)
        torch.testing.assert_close(found, paper)


@pytest.mark.parametrize("mask", ["mask", "alibi", "window", "documents"])
def test_dense_masks_are_what_our_arguments_mean(mask, monkeypatch):
    monkeypatch.setattr(masks, "WINDOW", 20)
    monkeypatch.setattr(masks, "DOCUMENT_LENGTHS", (20, 40))
    case = dataclasses.replace(SQUARE, mask=mask)
    inputs = make_inputs(case).detached()
    for name in ("stablemask flash", "stablemask reference", "sdpa"):
        _, share = prepare(case, ROWS[name], inputs, backward=False)
        assert share <= 1
    bias = masks.dense_bias(case)
    hidden = (bias == -torch.inf).expand(HEADS, -1, -1)
    assert hidden[:, 0, 1:].all()
    assert not hidden.diagonal(dim1=1, dim2=2).any()
    causal = torch.ones(70, 70, dtype=torch.bool).triu(1)
    assert (hidden.sum() > HEADS * causal.sum()) == (mask != "alibi")


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_ours_are_correct_or_say_why_not(name, dtype):
    for case in (SQUARE, DECODE):
        case = dataclasses.replace(case, dtype=dtype)
        inputs = make_inputs(case)
        refusal = None
        try:
            _, share = prepare(case, ROWS[name], inputs, backward=case.q_len > 1)
        except ValueError as error:
            refusal = str(error)
        if refusal is None:
            assert 0 < share <= 1
        else:
            assert name not in ("sdpa", "stablemask", "learned sink", "definition")
            assert "cannot serve this call" in refusal


@marks.peers
@pytest.mark.parametrize(
    "name", ["softmax-n flash", "softmax-n slow", "x-transformers", "gpt-oss eager"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [SQUARE, DECODE])
def test_peers_are_correct(name, dtype, case):
    case = dataclasses.replace(case, dtype=dtype)
    _, share = prepare(case, ROWS[name], make_inputs(case), backward=True)
    assert 0 < share <= 1


@marks.nightly
def test_compiled_flex_attention_is_correct():
    case = dataclasses.replace(SQUARE, groups=1)
    inputs = make_inputs(case).detached()
    _, share = prepare(case, ROWS["flex zero key"], inputs, backward=False)
    assert 0 < share <= 1


@pytest.mark.parametrize(
    ("name", "reason"),
    [("flex zero key", "no backward on the CPU"), ("flex lse", "no lse on the CPU")],
)
def test_what_flex_attention_does_not_do_on_the_cpu_is_said(name, reason):
    with pytest.raises(NotImplementedError, match=reason):
        prepare(SQUARE, ROWS[name], make_inputs(SQUARE), backward=True)


def test_the_check_sees_a_wrong_gradient_that_leaves_the_output_right():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.01

    row = ROWS["sdpa"]
    inputs = make_inputs(SQUARE)

    def build(case, inputs):
        return lambda: row.build(case, inputs._replace(key=Wrong.apply(inputs.key)))()

    wrong = dataclasses.replace(row, build=build)
    prepare(SQUARE, row, inputs, backward=True)
    prepare(SQUARE, wrong, inputs.detached(), backward=False)
    with pytest.raises(correctness.IncorrectError, match=r"of key is .* from the definition"):
        prepare(SQUARE, wrong, inputs, backward=True)


def test_a_missing_package_is_the_reason():
    row = dataclasses.replace(ROWS["x-transformers"], package="a_package_nobody_has")
    with pytest.raises(CannotServeError, match="needs the package a_package_nobody_has"):
        prepare(SQUARE, row, make_inputs(SQUARE), backward=False)


def test_keys_of_a_decoded_token_are_a_view_of_a_cache():
    inputs = make_inputs(DECODE)
    assert inputs.key.shape == (2, 2, 70, 16)
    assert inputs.key.untyped_storage().nbytes() > inputs.key.numel() * 4
    assert not inputs.key.is_contiguous()
