"""The definition of the paper, written out in float64: what every way of computing is held against.

Nothing here imports the package's backends.
"""

import torch
from torch import Tensor


def stable_mask_definition(
    query: Tensor, key: Tensor, value: Tensor, gamma: float | Tensor, horizon: int
) -> Tensor:
    """``(softmax(s * C + P) * C) @ v`` over ``horizon`` columns, literally, for a full square."""
    batch, heads, n, head_dim = query.shape
    groups = heads // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    padding = (0, 0, 0, horizon - n)
    key, value = (torch.nn.functional.pad(t, padding) for t in (key, value))
    column = torch.arange(horizon, dtype=torch.float64)
    row = torch.arange(n).unsqueeze(-1)
    causal = (torch.arange(horizon) <= row).double()
    rate = torch.as_tensor(gamma, dtype=torch.float64).reshape(-1, 1, 1)
    pseudo = -rate * column * (1 - causal)
    scores = query @ key.transpose(-2, -1) * head_dim**-0.5
    return (torch.softmax(scores * causal + pseudo, -1) * causal) @ value


def paper_definition(
    query: Tensor, key: Tensor, value: Tensor, gamma: float | Tensor, horizon: int
) -> Tensor:
    """The published form of any length: row by row, as many pseudo columns as the horizon leaves behind it,
    and one of score ``-gamma * i`` where it leaves none.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    rate = torch.as_tensor(gamma, dtype=torch.float64).reshape(-1, 1)
    rows = []
    for i in range(query.shape[2]):
        scores = (key[:, :, : i + 1] @ query[:, :, i, :, None]).squeeze(-1) * query.shape[
            -1
        ] ** -0.5
        columns = range(i + 1, horizon) if i < horizon - 1 else [i]
        pseudo = -rate * torch.tensor([*columns], dtype=torch.float64)
        weights = torch.cat((scores, pseudo.expand(*scores.shape[:2], -1)), -1).softmax(-1)
        rows.append(weights[:, :, None, : i + 1] @ value[:, :, : i + 1])
    return torch.cat(rows, 2)


def sink_definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sink_logits: Tensor,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Exponentials over their sum, for finite sinks; a row that sees nothing gives 0."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
    n, m = query.shape[2], key.shape[2]
    scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    mask = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    if visible is not None:
        mask = mask & visible
    weights = torch.where(mask, scores.exp(), 0.0)
    mass = weights.sum(-1) + torch.exp(sink_logits)
    mass = torch.where(mass == 0, 1.0, mass)
    return (weights / mass.unsqueeze(-1)) @ value


def gradients(out: Tensor, inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, inputs, grad.to(out.dtype))


def make_inputs(batch, heads, kv_heads, q_len, kv_len, dim, dtype, value_dim=None):
    def leaf(*shape):
        return torch.randn(shape).to(dtype).requires_grad_()

    return (
        leaf(batch, heads, q_len, dim),
        leaf(batch, kv_heads, kv_len, dim),
        leaf(batch, kv_heads, kv_len, value_dim or dim),
    )


def doubled(tensors):
    return tuple(t.detach().double().requires_grad_() for t in tensors)


def assert_no_further_than_twice(actual, dense, exact, term):
    """Twice as far from the truth as the dense backend in the same dtype, and four roundings of ``term``,
    the largest that is summed.
    """
    for ours, reference, truth in zip(actual, dense, exact, strict=True):
        assert ours.isfinite().all()
        roundings = 4 * torch.finfo(actual[0].dtype).eps * max(term, truth.abs().max())
        allowed = 2 * (reference.double() - truth).abs().max() + roundings
        assert (ours.double() - truth).abs().max() <= allowed


def assert_no_further_in_norm(actual, plain, exact):
    """As above for the tensors of a whole model by name, each in the norm, against another run in its dtype.

    A model rounds after every layer: 8 roundings of the largest tensor.
    """
    eps = max(torch.finfo(t.dtype).eps for t in actual.values())
    roundings = 8 * eps * max(truth.norm() for truth in exact.values())
    for name, truth in exact.items():
        assert actual[name].isfinite().all(), name
        allowed = 2 * (plain[name].double() - truth).norm() + roundings
        assert (actual[name].double() - truth).norm() <= allowed, name
