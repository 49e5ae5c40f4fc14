"""The flash operator in elementary operations, for exporters that know no other: ``torch.onnx.export``
finds it in PyTorch's table of decompositions. Programs that stay in PyTorch keep the operator whole.

The sink becomes one more key, of zeros, with the sink logit for a bias and zeros for a value. What is left
is a softmax over a row of finite and -inf scores, one finite at least; the other rows have none.

Letters: B batch, H query heads, n query rows, m keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...masks import Masks
from .operators import fake_forward, lse_dtype


def dense_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor | None,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    window: int | None,
    documents: Tensor | None,
    past: int,
    scale: float,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    """As :func:`~.operators.forward`, every score stored."""
    dtype, device = lse_dtype(query), query.device
    n, m = query.shape[2], key.shape[2]
    masks = Masks(attn_mask, alibi_slopes, None, documents)
    bias = masks.bias(slice(0, n), slice(0, m), past, dtype=dtype, device=device)
    if bias is None:
        bias = torch.zeros(1, 1, n, m, dtype=dtype, device=device)
    row, column = past + torch.arange(n, device=device)[:, None], torch.arange(m, device=device)
    hidden = column > row
    if window is not None:
        # Not by `Masks`, which would ask whether the length, a symbol here, exceeds it.
        hidden = hidden | (column <= row - window)
    bias = bias.masked_fill(hidden, -torch.inf)

    if sink_logits is None:
        sink_logits = bias.new_full((1, 1, 1), -torch.inf)
    sink = sink_logits.to(dtype).unsqueeze(-1)
    rows = torch.broadcast_shapes(bias.shape[:3], sink.shape[:3])
    bias = torch.cat([bias.expand(*rows, m), sink.expand(*rows, 1)], dim=-1)

    groups = query.shape[1] // key.shape[1]
    key, value = (
        F.pad(tensor.to(dtype), (0, 0, 0, 1)).repeat_interleave(groups, dim=1)
        for tensor in (key, value)
    )
    scores = query.to(dtype) @ key.mT * scale + bias
    # Without a softmax: a row that sees nothing, not even a sink, and one that its sink takes whole.
    largest = scores.amax(dim=-1, keepdim=True)
    settled = (largest == -torch.inf) | (sink == torch.inf)
    scores = scores.masked_fill(settled, 0.0)
    out = (torch.softmax(scores, dim=-1) @ value).masked_fill(settled, 0.0)
    lse = torch.where(settled, largest, torch.logsumexp(scores, dim=-1, keepdim=True))
    return out.to(query.dtype), lse.squeeze(-1)


def register() -> None:
    """Put the decomposition into PyTorch's table."""
    operator = torch.ops.stablemask.flash_forward.default
    torch._decomp.register_decomposition(operator)(dense_forward)
    # Shapes that are symbols would else be worked out by way of the decomposition.
    torch._decomp.register_decomposition(operator, type="meta")(fake_forward)
