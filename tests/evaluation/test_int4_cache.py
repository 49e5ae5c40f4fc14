"""A cache in four bits against numbers rounded by hand."""

import pytest
import torch
from transformers import DynamicCache

from stablemask.errors import InputError
from stablemask.evaluation.int4_cache import GROUP, Int4Layer, int4_cache, round_to_int4
from stablemask.evaluation.streaming import streaming_losses

from ..models.tiny import random_ids, tiny_model
from .families import tiny_transformer


def rounded_by_hand(group):
    """One group, a list of numbers: the nearest of 16 steps from its least to its largest."""
    low, high = min(group), max(group)
    steps = [low + (high - low) * step / 15 for step in range(16)]
    return [min(steps, key=lambda step: abs(step - number)) for number in group]


def test_numbers_are_rounded_to_sixteen_even_steps():
    numbers = torch.tensor([[-1.0, 0.04, 0.06, 14.0], [2.0, 2.0, 2.0, 2.0]])
    expected = torch.tensor([[-1.0, 0.0, 0.0, 14.0], [2.0, 2.0, 2.0, 2.0]])
    torch.testing.assert_close(round_to_int4(numbers, dim=1), expected)
    assert round_to_int4(numbers.bfloat16(), dim=1).dtype == torch.bfloat16


@pytest.mark.parametrize("keep", [0, 4, GROUP + 3])
@pytest.mark.parametrize("chunk", [1, GROUP, 2 * GROUP + 5])
def test_keys_by_channel_values_by_token(keep, chunk):
    keys, values = torch.randn(2, 1, 2, 2 * GROUP + 5, GROUP + 8).unbind()
    layer, seen = Int4Layer(keep), 0
    for k, v in zip(keys.split(chunk, 2), values.split(chunk, 2)):
        seen += k.shape[2]
        shown_keys, shown_values = layer.update(k, v)
        assert shown_keys.shape[2] == shown_values.shape[2] == layer.get_seq_length() == seen
        # What comes in is seen as it is.
        assert torch.equal(shown_keys[:, :, -k.shape[2] :], k)
        assert torch.equal(shown_values[:, :, -k.shape[2] :], v)
    expected_keys, expected_values = keys.clone(), values.clone()
    for start in (0, GROUP):
        first, end = max(start, keep), start + GROUP
        for head in range(2):
            for channel in range(GROUP + 8 if first < end else 0):
                group = keys[0, head, first:end, channel].tolist()
                expected_keys[0, head, first:end, channel] = torch.tensor(rounded_by_hand(group))
            for token in range(first, end):
                for channels in (slice(0, GROUP), slice(GROUP, GROUP + 8)):
                    group = values[0, head, token, channels].tolist()
                    expected_values[0, head, token, channels] = torch.tensor(rounded_by_hand(group))
    torch.testing.assert_close(layer.keys, expected_keys)
    torch.testing.assert_close(layer.values, expected_values)


@pytest.mark.parametrize(
    "make", [lambda: tiny_transformer("Llama"), lambda: tiny_transformer("Gemma3"), tiny_model]
)
def test_a_model_reads_what_was_rounded(make):
    model, ids = make(), random_ids(2, 2 * GROUP)
    exact = streaming_losses(model, ids, DynamicCache(config=model.config), chunk_size=GROUP)
    kept = streaming_losses(model, ids, int4_cache(model, keep=2 * GROUP), chunk_size=GROUP)
    torch.testing.assert_close(kept, exact)
    rounded = streaming_losses(model, ids, int4_cache(model), chunk_size=GROUP)
    torch.testing.assert_close(rounded[:, :GROUP], exact[:, :GROUP])
    difference = (rounded - exact)[:, GROUP:].abs()
    assert 0 < difference.mean() < 0.3


def test_bad_arguments():
    with pytest.raises(InputError, match="keep must be at least 0, got -1"):
        int4_cache(tiny_transformer("Llama"), keep=-1)
