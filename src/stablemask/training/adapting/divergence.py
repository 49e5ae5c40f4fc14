"""How far the student is from its teacher: the mean KL divergence of what they predict.

Letters: N tokens, d and e the hidden sizes of student and teacher, V vocabulary.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...models.loss import chunked_loss

CHUNK_LOGITS = 1 << 26


def linear_head(model: Any, input_ids: Tensor) -> nn.Linear | None:
    """The output layer, where all logits are its alone: not scaled or capped after it, and without a bias."""
    head = model.get_output_embeddings()
    with torch.no_grad():
        hidden_states = model.get_decoder()(input_ids=input_ids, use_cache=False)[0]
        logits = model(input_ids=input_ids, use_cache=False).logits
    plain = F.linear(hidden_states, head.weight).to(logits.dtype)
    close = torch.allclose(plain, logits, rtol=1e-3, atol=1e-3 * logits.abs().max().item())
    return head if close else None


def kl_of_hidden(
    student: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor, real: Tensor
) -> Tensor:
    """KL(teacher || student) from hidden states and output weights, never holding all logits; float32, scalar.

    Mean over real tokens. Its gradients, those of the student, are worked out with it.

    Args:
        student, teacher: (B, n, d), (B, n, e).
        weight, teacher_weight: (V, d), (V, e).
        real: (B, n).
    """
    scales = real.flatten()[:, None].float() / real.sum()
    of_chunk = partial(_of_chunk, teacher_weight.detach().to(student.dtype))
    targets = teacher.detach().flatten(0, 1).to(student.dtype)
    return chunked_loss(student.flatten(0, 1), weight, targets, scales, of_chunk)


def kl_of_logits(student: Tensor, teacher: Tensor, real: Tensor) -> Tensor:
    """The same from all logits, (B, n, V); of the rest a chunk of tokens at a time."""
    rows = max(1, CHUNK_LOGITS // student.shape[-1])
    scales = real.flatten().float() / real.sum()
    parts = zip(
        student.flatten(0, 1).split(rows),
        teacher.flatten(0, 1).split(rows),
        scales.split(rows),
        strict=True,
    )
    total = [checkpoint(_kl, *part, use_reentrant=False) for part in parts]
    return torch.stack(total).sum()


def _kl(student: Tensor, teacher: Tensor, scales: Tensor) -> Tensor:
    ours, goal = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return ((goal.exp() * (goal - ours)).sum(-1) * scales).sum()


def _of_chunk(
    teacher_weight: Tensor,
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    scales: Tensor,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """As of :func:`~stablemask.models.loss.chunked_loss`; the gradient of logits is (ours - goal) scales."""
    ours = F.linear(hidden, weight).float().log_softmax(-1)
    goal = F.linear(teacher_hidden, teacher_weight).float().log_softmax(-1)
    shares = goal.exp()
    loss = ((shares * goal.sub_(ours)).sum(-1, keepdim=True) * scales).sum()
    if not with_gradient:
        return loss, ours.new_empty(0)
    return loss, (ours.exp_().sub_(shares)).mul_(scales).to(hidden.dtype)
