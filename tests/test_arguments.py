"""Bad arguments raise before any work, and the message names them."""

import pytest
import torch

from stablemask import sink_attention, stable_mask_attention


def _call(function=sink_attention, **changes):
    query, key, value = (torch.randn(2, 4, 6, 8) for _ in range(3))
    arguments = {"query": query, "key": key, "value": value, **changes}
    if function is sink_attention:
        arguments.setdefault("sink_logits", 0.0)
    else:
        arguments.setdefault("gamma", 0.1)
    return function(**arguments)


@pytest.mark.parametrize(
    ("changes", "error", "names"),
    [
        ({"query": 3}, TypeError, "query"),
        ({"query": torch.ones(4, 6, 8)}, ValueError, "query"),
        ({"query": torch.ones(2, 4, 6, 8, dtype=torch.int64)}, TypeError, "query"),
        ({"key": torch.ones(2, 4, 6, 8, dtype=torch.float64)}, TypeError, "dtype"),
        ({"key": torch.ones(2, 4, 6, 8, device="meta")}, ValueError, "key is on meta"),
        ({"key": torch.ones(3, 4, 6, 8)}, ValueError, "batch"),
        ({"key": torch.ones(2, 4, 6, 7)}, ValueError, "head_dim"),
        ({"key": torch.ones(2, 4, 7, 8)}, ValueError, "kv_len"),
        ({"key": torch.ones(2, 3, 6, 8), "value": torch.ones(2, 3, 6, 8)}, ValueError, "kv_heads"),
        ({"key": torch.ones(2, 4, 3, 8), "value": torch.ones(2, 4, 3, 8)}, ValueError, "q_len"),
        ({f: torch.ones(2, 4, 6, 0) for f in ("query", "key")}, ValueError, "head_dim"),
        ({"sink_logits": torch.zeros(4)}, ValueError, "sink_logits"),
        ({"sink_logits": torch.zeros(4, 1, dtype=torch.int64)}, TypeError, "sink_logits"),
        ({"sink_logits": "0"}, TypeError, "sink_logits"),
        ({"sink_logits": torch.zeros(4, 1, device="meta")}, ValueError, "sink_logits"),
        ({"attn_mask": torch.ones(5, dtype=torch.bool)}, ValueError, "attn_mask"),
        ({"attn_mask": torch.ones(6, dtype=torch.int64)}, TypeError, "attn_mask"),
        ({"attn_mask": [True]}, TypeError, "attn_mask"),
        ({"attn_mask": torch.ones(6, device="meta")}, ValueError, "attn_mask"),
        ({"window": 0}, ValueError, "window"),
        ({"window": 2.0}, ValueError, "window"),
        ({"alibi_slopes": torch.ones(3)}, ValueError, "alibi_slopes"),
        ({"alibi_slopes": [1.0] * 4}, TypeError, "alibi_slopes"),
        ({"documents": torch.ones(6)}, TypeError, "documents"),
        ({"documents": torch.ones(5, dtype=torch.int64)}, ValueError, "documents"),
        ({"sink_logits": True}, TypeError, "sink_logits"),
        ({"sink_logits": float("nan")}, ValueError, "sink_logits"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p"),
        ({"dropout_p": "0.1"}, TypeError, "dropout_p"),
        ({"scale": "1"}, TypeError, "scale"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p"),
        ({"scale": float("nan")}, ValueError, "scale"),
        ({"backend": "fastest"}, ValueError, "backend"),
        ({"backend": "cudnn"}, ValueError, "CUDA"),
        ({"backend": "flash", "dropout_p": 0.5}, ValueError, "dropout"),
        ({"backend": "flash", "attn_mask": torch.zeros(6, requires_grad=True)}, ValueError, "mask"),
    ],
)
def test_bad_arguments_are_named(changes, error, names):
    with pytest.raises(error, match=names):
        _call(**changes)
    # Without gradients, where a decode step takes a way of its own.
    with torch.no_grad(), pytest.raises(error, match=names):
        _call(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "names"),
    [
        ({"gamma": -1.0}, ValueError, "gamma"),
        ({"gamma": None}, TypeError, "gamma"),
        ({"gamma": float("nan")}, ValueError, "gamma"),
        ({"gamma": torch.ones(3)}, ValueError, "gamma"),
        ({"horizon": -1}, ValueError, "horizon"),
        ({"positions": torch.arange(5)}, ValueError, "positions"),
        ({"positions": torch.arange(6.0)}, TypeError, "positions"),
        ({"positions": torch.zeros(3, 6, dtype=torch.int64)}, ValueError, "positions"),
    ],
)
def test_bad_stable_mask_arguments_are_named(changes, error, names):
    with pytest.raises(error, match=names):
        _call(stable_mask_attention, **changes)
    if "positions" not in changes:  # a decode step
        with torch.no_grad(), pytest.raises(error, match=names):
            _call(stable_mask_attention, query=torch.ones(2, 4, 1, 8), **changes)
