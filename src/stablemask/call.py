"""What a backend is asked to compute, its arguments checked.

Letters: B batch, H query heads, K key heads, n query rows, m keys, D head_dim, V value_dim.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .masks import Masks


class Call(NamedTuple):
    """One call of the attention: causal, aligned bottom-right, with one sink logit per row.

    Attributes:
        query: (B, H, n, D).
        key, value: (B, K, m, D) and (B, K, m, V), of the dtype of query; K divides H, n <= m.
        sink_logits: floating point, three-dimensional, broadcastable to (B, H, n); or a number, which a kernel
            may take as it is (see :meth:`sinks`).
        masks: everything on top of causality.
        dropout_p: of the attention weights, in [0, 1).
        scale: of the scores.
        watched: whether autograd, a transform or a compiler may look on. It is asked once, for a question takes
            as long as an operation.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    sink_logits: Tensor | float
    masks: Masks
    dropout_p: float
    scale: float
    watched: bool = True

    def sinks(self) -> Tensor:
        """``sink_logits`` as a tensor, also where it is a number."""
        return as_tensor(self.sink_logits, self.query)


def as_tensor(sink_logits: Tensor | float, query: Tensor) -> Tensor:
    """Checked sink logits as a tensor beside ``query``; of a number, (1, 1, 1)."""
    if isinstance(sink_logits, Tensor):
        return sink_logits
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return torch.full((1, 1, 1), sink_logits, dtype=dtype, device=query.device)
