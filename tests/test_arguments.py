"""Bad arguments raise before any work, and the message names them."""

import pytest
import torch

from stablemask import sink_attention, stable_mask_attention

RAGGED = torch.nested.nested_tensor([torch.ones(n, 4, 8) for n in (6, 3)], layout=torch.jagged)
RAGGED = RAGGED.transpose(1, 2)
EIGHT_BITS = torch.ones(2, 4, 6, 8, dtype=torch.float8_e4m3fn)


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
        ({"query": torch.ones(2, 4, 6, 8).to_sparse()}, TypeError, "dense tensor, got .*sparse"),
        (dict.fromkeys(("query", "key", "value"), RAGGED), TypeError, "dense .*documents"),
        ({"query": torch.ones(2, 4, 6, 8, dtype=torch.int64)}, TypeError, "query"),
        (
            dict.fromkeys(("query", "key", "value"), EIGHT_BITS),
            TypeError,
            "query must be .* 16, 32",
        ),
        ({"attn_mask": EIGHT_BITS[0, 0, 0, :6]}, TypeError, "attn_mask .*float8"),
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
        ({"sink_logits": EIGHT_BITS[0, :, :, 0]}, TypeError, "sink_logits .* 16, 32 .*float8"),
        ({"sink_logits": torch.zeros(4, 1, device="meta")}, ValueError, "sink_logits"),
        ({"attn_mask": torch.ones(5, dtype=torch.bool)}, ValueError, "attn_mask"),
        ({"attn_mask": torch.ones(6, dtype=torch.int64)}, TypeError, "attn_mask"),
        ({"attn_mask": [True]}, TypeError, "attn_mask"),
        ({"attn_mask": torch.ones(6, device="meta")}, ValueError, "attn_mask"),
        ({"window": 0}, ValueError, "window"),
        ({"window": 2.0}, ValueError, "window"),
        ({"window": 10**30}, ValueError, "window .* below 2.*63, or None, got 10{30}$"),
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
        ({"scale": 10**400}, ValueError, "scale must be a finite number"),
        ({"is_causal": False}, ValueError, "is_causal must be True, got False"),
        ({"is_causal": None}, TypeError, "is_causal must be a bool, got None"),
        ({"enable_gqa": 1}, TypeError, "enable_gqa must be a bool, got 1"),
        (
            {"enable_gqa": False, **{name: torch.ones(2, 2, 6, 8) for name in ("key", "value")}},
            ValueError, "enable_gqa must be True for 4 query heads on 2 key heads",
        ),
        ({"backend": "fastest"}, ValueError, "backend"),
        ({"backend": "cudnn"}, ValueError, "CUDA"),
        ({"backend": "flash", "dropout_p": 0.5}, ValueError, "dropout"),
        ({"backend": "flash", "attn_mask": torch.zeros(6, requires_grad=True)}, ValueError, "mask"),
    ],
)  # fmt: skip
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
        ({"gamma": EIGHT_BITS[0, :, 0, 0]}, TypeError, "gamma .*float8"),
        ({"horizon": -1}, ValueError, "horizon"),
        ({"horizon": 10**30}, ValueError, "horizon"),
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


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sink_logits", torch.nn.Parameter(torch.zeros(3, 1)), r"must broadcast to .*\(3, 1\)"),
        ("attn_mask", torch.zeros(3, 5), "attn_mask must broadcast to "),
        ("sink_logits", float("nan"), "must be a number or a tensor, got nan"),
        ("scale", float("inf"), "scale must be a finite number, got inf"),
        ("scale", float("nan"), "scale must be a finite number, got nan"),
        ("window", 0, "window must be an int of at least 1 and below 2.*63, or None, got 0"),
        ("dropout_p", 1.5, r"dropout_p must be in \[0, 1\), got 1.5"),
        ("alibi_slopes", torch.ones(3), r"alibi_slopes must be \(heads,\) = \("),
        ("gamma", -1.5, "gamma must be greater than 0 with an infinite horizon, got -1.5"),
        ("gamma", torch.nn.Parameter(torch.ones(3)), r"\(heads,\) = \(4,\), got shape \(3,\)"),
        ("positions", torch.arange(5), r"positions must be \(q_len,\) or \(batch, q_len\)"),
        ("horizon", -1, "horizon must be at least 0 and below 2.*63, got -1"),
    ],
)
def test_bad_arguments_are_named_where_they_are_symbols(name, value, message):
    stable = name in ("gamma", "positions", "horizon")

    def attend(query, key, value, argument):
        arguments = {**({"gamma": 0.1} if stable else {"sink_logits": 0.0}), name: argument}
        function = stable_mask_attention if stable else sink_attention
        return function(query, key, value, **arguments)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="eager")
    query, key, values = (torch.randn(2, 4, 6, 8) for _ in range(3))
    with pytest.raises(Exception, match=message):
        compiled(query, key, values, value)
