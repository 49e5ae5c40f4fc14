"""The learning rate by step, as a share of its peak."""

import math


def rate_at(step: int, *, warmup: int, steps: int, shape: str, start: float, end: float) -> float:
    """Linear from ``start`` to the peak in the first ``warmup`` steps, then down to ``end`` at the last.

    With a cosine from 0 it is Transformers' ``cosine_with_min_lr``, to the same bits. None of its types has
    a starting rate and an end that differ.

    Args:
        shape: ``cosine`` or ``linear``.
        start, end: shares of the peak.
    """
    if step < warmup:
        return start + (1.0 - start) * (step / warmup)
    done = (step - warmup) / max(1, steps - warmup)
    left = 1.0 - done if shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return max(0.0, left * (1.0 - end) + end)
