"""The first token's share and the fading value, against the dense softmax and the prefixed model."""

import pytest
import torch
from torch import nn

from stablemask.training.adapting.reading import Reading
from stablemask.training.adapting.watch import (
    FIRST_ROW,
    Pass,
    Recorded,
    Watch,
    excess,
    first_share,
    record,
    with_fading_value,
)

from .models import MODELS, PREFIX, softmax_with_settings, texts


@pytest.mark.parametrize("name", MODELS)
def test_with_the_prefix_s_scores_and_value_the_student_is_its_teacher(name):
    """On every real token, in texts that begin with the prefix themselves too, and past a window."""
    torch.manual_seed(0)
    model = softmax_with_settings(name)
    ids = texts(3, 12)
    reading, watch = Reading.of(ids, PREFIX), Watch(model)
    with torch.no_grad():
        with watch.over(record, Recorded()) as seen:
            goal = reading.rows(model(reading.teacher, use_cache=False).logits)
        values = {layer: value[1] for layer, value in seen.values.items()}

        def with_its_scores(now, layer, query, key, value, sink, **masks):
            scores = reading.rows(seen.scores[layer], dim=2)
            # A text that begins with the prefix has it as a key, and needs no sink.
            scores = scores.masked_fill(reading.has_prefix[:, None, None], -torch.inf)
            return with_fading_value(now, layer, query, key, value, scores, **masks)

        of_student = Pass(torch.ones_like(ids, dtype=torch.bool), 1.0, values, {})
        with watch.over(with_its_scores, of_student):
            logits = model(ids, use_cache=False).logits
        plain = model(ids, use_cache=False).logits
    # The angles of rotary positions are float32, and the teacher's positions are one on.
    torch.testing.assert_close(logits, goal, rtol=1e-5, atol=1e-5)
    assert (plain[1:] - goal[1:]).abs().max() > 0.05
    assert of_student.shares.keys() == {0, 1}


@pytest.mark.parametrize("masks", [{}, {"window": 9}, {"alibi_slopes": True}, {"attn_mask": True}])
def test_the_share_is_that_of_the_dense_softmax_and_its_gradient_goes_through_the_score(masks):
    torch.manual_seed(0)
    n = 12
    query = torch.randn(2, 4, n, 8, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 2, n, 8, dtype=torch.float64, requires_grad=True)
    sink = torch.randn(4, 1, dtype=torch.float64)
    real = torch.ones(2, n, dtype=torch.bool)
    real[1, 10:] = False
    scores = query @ key.repeat_interleave(2, 1).mT * 0.3
    distance = torch.arange(n)[:, None] - torch.arange(n)
    unseen = distance < 0
    if "window" in masks:
        unseen = unseen | (distance >= masks["window"])
    if "alibi_slopes" in masks:
        masks = {"alibi_slopes": torch.tensor([0.5, 0.2, 0.1, 0.05])}
        scores = scores - masks["alibi_slopes"][:, None, None] * distance
    if "attn_mask" in masks:
        masks = {"attn_mask": torch.rand(2, 1, n, n) < 0.7}
        unseen = unseen | ~masks["attn_mask"]
    scores = scores.masked_fill(unseen, -torch.inf)
    lse = torch.logaddexp(scores.logsumexp(-1), sink)
    counted = real.clone()
    counted[:, :FIRST_ROW] = False
    expected = ((scores[..., 0] - lse.detach()).exp() * counted[:, None]).sum() / (
        counted.sum() * 4
    )

    share = first_share(query, key, lse, real, scale=0.3, **masks)
    torch.testing.assert_close(share, expected)
    ours = torch.autograd.grad(share, (query, key), retain_graph=True)
    theirs = torch.autograd.grad(expected, (query, key))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_only_what_lies_over_the_bound_counts_and_only_on_real_tokens():
    hidden = torch.tensor([[[1.0, -30.0], [5.0, 2.0], [100.0, 0.0]]])
    real = torch.tensor([[True, True, False]])
    assert excess(hidden, real, 4.0, 10.0).item() == pytest.approx((26 + 1) / 10 / 2)


def test_what_checkpointing_computes_again_is_not_counted_twice():
    """And the gradients are those without checkpointing."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = softmax_with_settings("llama", torch.float32).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        ids = texts(2, 12)
        real = torch.ones_like(ids, dtype=torch.bool)
        values = {layer: torch.ones(2, 8) for layer in (0, 1)}
        watch, seen = Watch(model), Pass(real, 0.5, values, {0: (0.1, 1.0)})
        watch.set(with_fading_value, seen)
        logits = model(ids, use_cache=False).logits
        seen.open = False
        found = {**seen.shares}
        loss = logits.square().mean() + sum(found.values()) + seen.excesses[0]
        loss.backward()
        assert seen.shares == found
        watch.set(None, None)
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)
    assert any(bool(gradient.any()) for gradient in gradients[0])


def test_nothing_is_watched_afterwards():
    model = softmax_with_settings("ours", torch.float32)
    ids = texts(1, 6)
    expected = model(ids).logits
    with Watch(model).over(record, Recorded()):
        model(ids)
    assert torch.equal(model(ids).logits, expected)
    assert not any(
        module._forward_hooks for module in model.modules() if isinstance(module, nn.Module)
    )
