"""The summary of a sink against what each of its parts is by itself."""

import math

import pytest
import torch
import torch.nn.functional as F

from stablemask.errors import InputError
from stablemask.evaluation import attention_maps, first_token_attention, sink_summary
from stablemask.evaluation.activations import hidden_state_outliers
from stablemask.hf import apply_stablemask

from ..models.tiny import random_ids, tiny_model
from .families import tiny_transformer

LENGTH, PREFIX = 16, 7


def stable_llama():
    shift = [[0.5 * layer - head for head in range(4)] for layer in range(3)]
    return apply_stablemask(tiny_transformer("Llama"), gamma=0.1, shift=shift)


@pytest.mark.parametrize("prefix", [None, PREFIX])
@pytest.mark.parametrize("make", [lambda: tiny_transformer("Llama"), stable_llama, tiny_model])
def test_it_is_the_sum_of_its_parts(make, prefix):
    model, ids = make(), random_ids(3, LENGTH).clamp(min=PREFIX + 1)
    summary = sink_summary(model, ids, prefix, progress=False)
    read = ids if prefix is None else torch.cat((torch.full((3, 1), prefix), ids), dim=1)
    with torch.no_grad():
        logits = model(read, use_cache=False).logits[:, -LENGTH:-1]
    nats = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(1)
    assert summary.nats == pytest.approx(nats.tolist(), rel=1e-5)
    assert summary.perplexity == pytest.approx(math.exp(nats.mean()), rel=1e-5)

    maps = [attention_maps(model, row) for row in read]
    first = torch.stack([first_token_attention(one) for one in maps]).mean(0)
    assert summary.first_token == pytest.approx(first.tolist(), rel=1e-5)
    assert summary.mean_first_token == pytest.approx(first.mean().item(), rel=1e-5)
    assert summary.worst_first_token == max(summary.first_token)
    pseudo = torch.stack([one.pseudo.mean((1, 2)) for one in maps]).mean(0)
    assert summary.pseudo == pytest.approx(pseudo.tolist(), rel=1e-5)
    received = [
        [one.real[..., token + 1 :, token].mean(-1) for token in range(LENGTH // 2)] for one in maps
    ]
    top = torch.stack([torch.stack(tokens).amax(0).mean(-1) for tokens in received]).mean(0)
    assert summary.top_token == pytest.approx(top.tolist(), rel=1e-5)

    outliers = hidden_state_outliers(model, read)
    assert summary.largest == pytest.approx(outliers.largest.tolist(), rel=1e-5)
    assert summary.largest_activation == max(summary.largest[:-1])
    assert summary.kurtosis == pytest.approx(outliers.kurtosis.tolist(), rel=1e-5)
    assert summary.worst_kurtosis == max(summary.kurtosis[:-1])


def test_a_sequence_that_begins_with_the_prefix_gets_no_second_one():
    model, ids = tiny_transformer("Llama"), random_ids(2, LENGTH)
    ids[:, 0] = PREFIX
    assert sink_summary(model, ids, PREFIX) == sink_summary(model, ids)


def test_bad_inputs():
    model = tiny_transformer("Llama")
    with pytest.raises(InputError, match=r"n of at least 2, got \(16,\)"):
        sink_summary(model, random_ids(16))
    with pytest.raises(InputError, match="token id 61"):
        sink_summary(model, random_ids(1, 8), 61)
    with pytest.raises(InputError, match="token id -1 is outside"):
        sink_summary(model, random_ids(1, 8), -1)
    with pytest.raises(InputError, match=r"65 tokens needs 65 positions"):
        sink_summary(tiny_transformer("GPT2"), random_ids(1, 64), 3)
    with pytest.raises(InputError, match="BloomForCausalLM cannot be captured"):
        sink_summary(tiny_transformer("Bloom"), random_ids(1, 8))
    model.lm_head.weight.data[0] = math.nan
    with pytest.raises(InputError, match="not finite"):
        sink_summary(model, random_ids(1, 8))
