"""What a backend is asked to compute, its arguments checked.

Letters: B batch, H query heads, K key heads, n query rows, m keys, D head_dim, V value_dim.
"""

from typing import NamedTuple

from torch import Tensor

from .masks import Masks


class Call(NamedTuple):
    """One call of the attention: causal, aligned bottom-right, with one sink logit per row.

    Attributes:
        query: (B, H, n, D).
        key, value: (B, K, m, D) and (B, K, m, V), of the dtype of query; K divides H, n <= m.
        sink_logits: floating point, three-dimensional, broadcastable to (B, H, n).
        masks: everything on top of causality.
        dropout_p: of the attention weights, in [0, 1).
        scale: of the scores.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    sink_logits: Tensor
    masks: Masks
    dropout_p: float
    scale: float
