"""The flash operator in elementary operations: against the definition, and as what ONNX Runtime runs."""

import numpy as np
import pytest
import torch

from stablemask import sink_attention, stable_mask_attention
from stablemask.backends.stock.decomposition import dense_forward
from stablemask.backends.stock.operators import flash_forward

from ..oracle import make_inputs, sink_definition

QUERIES, KEYS = 7, 10
ROW, COLUMN = torch.arange(KEYS - QUERIES, KEYS)[:, None], torch.arange(KEYS)
SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.0])
DOCUMENTS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
MASK = torch.rand(2, 1, QUERIES, KEYS, generator=torch.Generator().manual_seed(0)) < 0.5
MASK[0, :, 3] = False  # a row that sees nothing


def dense(query, key, value, sink, *, mask=None, slopes=None, window=None, documents=None):
    scale = query.shape[-1] ** -0.5
    return dense_forward(
        query, key, value, sink, mask, slopes, window, documents, KEYS - QUERIES, scale, "cpu"
    )


@pytest.mark.parametrize(
    ("masks", "visible", "bias"),
    [
        ({}, None, None),
        ({"mask": MASK}, MASK, None),
        ({"window": 3}, COLUMN > ROW - 3, None),
        ({"slopes": SLOPES}, None, -SLOPES.double()[:, None, None] * (ROW - COLUMN)),
        (
            {"documents": DOCUMENTS[None], "window": 2},
            (DOCUMENTS[3:, None] == DOCUMENTS) & (COLUMN > ROW - 2),
            None,
        ),
    ],
)
def test_equals_the_definition(masks, visible, bias):
    query, key, value = make_inputs(2, 4, 2, QUERIES, KEYS, 8, torch.float64)
    sink = torch.randn(1, 4, QUERIES, dtype=torch.float64)
    out, lse = dense(query, key, value, sink, **masks)
    expected = sink_definition(query, key, value, sink, visible, bias)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    # A value of 1 for every key gives each row its real share, which the lse must explain.
    ones = sink_definition(query, key, torch.ones_like(value), sink, visible, bias)[..., 0]
    torch.testing.assert_close(1 - torch.exp(sink - lse), ones, rtol=0, atol=1e-14)


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("sink", [None, -torch.inf, torch.inf, 0.0, -1e32, LOWEST, 1e32])
def test_rows_that_see_nothing_and_infinite_sinks_are_the_operators(sink):
    query, key, value = (t.detach() for t in make_inputs(2, 4, 2, 7, 10, 8, torch.float32))
    sink = None if sink is None else torch.full((1, 1, 1), sink)
    out, lse = dense(query, key, value, sink, mask=MASK)
    rest = (MASK, None, None, None, KEYS - QUERIES, 8**-0.5, "cpu")
    expected, expected_lse = flash_forward(query, key, value, sink, *rest)
    torch.testing.assert_close(out, expected)
    # Where the sink takes all but what float32 can tell, the operator's is infinite.
    finite = expected_lse < torch.inf
    torch.testing.assert_close(lse[finite], expected_lse[finite])
    assert finite.all() or (lse[~finite] == sink).all()


def test_half_precision_is_no_further_from_the_truth():
    inputs = [t.detach() for t in make_inputs(1, 2, 2, QUERIES, KEYS, 8, torch.bfloat16)]
    out, lse = dense(*inputs, torch.zeros(1, 1, 1))
    expected = sink_definition(*(t.double() for t in inputs), torch.zeros(1, 1, 1))
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert (out - expected).abs().max() <= 2 * (expected.bfloat16() - expected).abs().max()


class Everything(torch.nn.Module):
    """Every mask at once, and the sinks of two kinds."""

    def forward(self, query, key, value, documents):
        masks = {"window": 3, "alibi_slopes": SLOPES, "documents": documents}
        masked = sink_attention(query, key, value, 0.5, **masks)
        return masked, stable_mask_attention(query, key, value, gamma=0.1)


def test_onnx_runtime_agrees_at_every_length():
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    def inputs(batch, q_len, kv_len):
        tensors = [t.detach() for t in make_inputs(batch, 4, 2, q_len, kv_len, 8, torch.float32)]
        return *tensors, torch.arange(kv_len) // 4

    names = {0: "batch", 2: "length"}, *[{0: "batch", 2: "keys"}] * 2, {0: "keys"}
    program = torch.onnx.export(
        Everything().eval(), inputs(2, 6, 9), dynamic_shapes=names, verbose=False
    )
    assert {node.domain for node in program.model.graph} == {""}
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for shape in [(2, 6, 9), (1, 1, 1), (3, 2, 17), (1, 40, 40), (2, 1, 5)]:
        given = inputs(*shape)
        feed = {spec.name: t.numpy() for spec, t in zip(session.get_inputs(), given, strict=True)}
        for output, expected in zip(session.run(None, feed), Everything()(*given), strict=True):
            np.testing.assert_allclose(output, expected, rtol=0, atol=2e-6)
