"""The divergence in chunks, against the dense one, in value and gradients."""

import pytest
import torch

from stablemask.models import loss
from stablemask.training.adapting import divergence
from stablemask.training.adapting.divergence import kl_of_hidden, kl_of_logits, linear_head

from .models import cohere, llama, ours, texts


def dense(student: torch.Tensor, teacher: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    goal = teacher.double().log_softmax(-1)
    ours = student.double().log_softmax(-1)
    return (
        torch.nn.functional.kl_div(ours, goal, reduction="none", log_target=True)
        .sum(-1)[real]
        .mean()
    )


@pytest.mark.parametrize("from_hidden", [True, False])
def test_chunks_add_up_to_the_dense_divergence(from_hidden, monkeypatch):
    monkeypatch.setattr(loss, "_most_rows", lambda weight: 4)
    monkeypatch.setattr(divergence, "CHUNK_LOGITS", 4 * 19)
    torch.manual_seed(0)
    hidden = torch.randn(2, 7, 8, requires_grad=True)
    weight = torch.randn(19, 8, requires_grad=True)
    goal, goal_weight = torch.randn(2, 7, 6), torch.randn(19, 6)
    real = torch.rand(2, 7) < 0.7
    logits, goal_logits = hidden @ weight.T, goal @ goal_weight.T
    expected = dense(logits, goal_logits, real)
    found = (
        kl_of_hidden(hidden, weight, goal, goal_weight, real)
        if from_hidden
        else kl_of_logits(logits, goal_logits, real)
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    theirs = torch.autograd.grad(expected, (hidden, weight), retain_graph=True)
    for one, other in zip(torch.autograd.grad(found, (hidden, weight)), theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("make", "plain"), [(llama, True), (ours, True), (cohere, False)])
def test_logits_that_are_changed_after_the_output_layer_are_noticed(make, plain):
    assert (linear_head(make(), texts(1, 4)) is not None) == plain
