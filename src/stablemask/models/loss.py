"""The loss of a language model from its hidden states, without ever holding all logits.

The logits of a vocabulary of 50,000 outweigh everything else in a small model. Here a chunk of tokens
at a time gets its logits, its share of the loss and its share of the gradients, and they are dropped.
``F.linear_cross_entropy`` of PyTorch 2.13 works alike, but returns the loss of bfloat16 inputs in
bfloat16, 3 digits of it, and adds up the gradient of the weight in bfloat16 too.

Letters: N tokens, d hidden size, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import hardware
from ..backends.calls import say_once

# The loss of a chunk of tokens and the gradient of its logits, see `_of_chunk`.
OfChunk = Callable[[Tensor, Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]

IGNORED = -100
# Logits held at a time: 256 MiB in float32, and enough tokens to keep a GPU busy.
CHUNK_LOGITS = 1 << 26
CACHED_LOGITS = 1 << 21  # a CPU is faster with what stays in its caches


def chunked_causal_lm_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor | None = None,
    *,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **kwargs: Any,
) -> Tensor:
    """What Transformers' ``ForCausalLMLoss`` makes of ``hidden_states @ weight.T``, float32, scalar.

    Its gradients are worked out together with it; they can be taken once, and not be differentiated.

    Args:
        hidden_states: (batch, length, d).
        weight: (V, d), a plain tensor: under FSDP2 it must be gathered by then.
        labels: (batch, length), -100 where not counted; shifted here.
        shift_labels: the same, shifted already, in place of ``labels``.
        num_items_in_batch: the loss is the sum over this; by default over the labels counted.
        kwargs: ignored, as there.

    Raises:
        ValueError: there are more or fewer labels than hidden states, as with ``logits_to_keep``.
    """
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=IGNORED)[..., 1:]
    targets = shift_labels.flatten().to(hidden_states.device)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != IGNORED).sum()
    scale = 1 / torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=targets.device)
    device_type = hidden_states.device.type
    if torch.is_autocast_enabled(device_type):
        hidden_states = hidden_states.to(torch.get_autocast_dtype(device_type))
    hidden_states = hidden_states.flatten(0, -2)
    if len(hidden_states) != len(targets):
        raise ValueError(f"{len(targets)} labels do not fit {len(hidden_states)} hidden states")
    counted = (targets != IGNORED)[:, None]
    targets = targets.clamp(min=0)[:, None]
    return chunked_loss(hidden_states, weight, targets, counted * scale, _fused(weight))


def chunked_loss(
    hidden_states: Tensor, weight: Tensor, targets: Tensor, scales: Tensor, of_chunk: OfChunk
) -> Tensor:
    """The sum over tokens of a loss of their logits, ``hidden_states @ weight.T``, float32, scalar.

    Its gradients are worked out together with it; they can be taken once, and not be differentiated.

    Args:
        hidden_states: (N, d), in the dtype to compute in.
        weight: (V, d). Its gradient is added up in float32.
        targets: (N, ...), of each token.
        scales: (N, 1), float32, its weight in the sum.
        of_chunk: as :func:`_of_chunk`.
    """
    if torch.is_grad_enabled():
        return _ChunkedLoss.apply(hidden_states, weight, targets, scales, of_chunk)
    return _loss_and_gradients(hidden_states, weight, targets, scales, of_chunk, (False, False))[0]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: Tensor,
        weight: Tensor,
        targets: Tensor,
        scales: Tensor,
        of_chunk: OfChunk,
    ):
        loss, *gradients = _loss_and_gradients(
            hidden_states, weight, targets, scales, of_chunk, ctx.needs_input_grad[:2]
        )
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor):
        # In place, for they may be the largest tensors there are; a second backward is refused.
        gradients = [
            None if gradient is None else gradient.mul_(grad_loss) for gradient in ctx.saved_tensors
        ]
        return *gradients, None, None, None


def _loss_and_gradients(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    scales: Tensor,
    of_chunk: OfChunk,
    needed: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss of :func:`chunked_loss`, and its gradients where ``needed``."""
    dtype = hidden_states.dtype
    cast_weight = weight.to(dtype)
    grad_hidden = torch.empty_like(hidden_states) if needed[0] else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needed[1] else None
    loss = scales.new_zeros(())
    num_chunks = max(1, -(-len(hidden_states) // _most_rows(weight)))
    rows = max(1, -(-len(hidden_states) // num_chunks))
    for start in range(0, len(hidden_states), rows):
        chunk = slice(start, start + rows)
        hidden = hidden_states[chunk]
        part, grad_logits = of_chunk(
            hidden, cast_weight, targets[chunk], scales[chunk], any(needed)
        )
        loss = loss + part
        if grad_hidden is not None:
            grad_hidden[chunk] = grad_logits @ cast_weight
        if grad_weight is not None:
            if dtype == torch.float32:
                grad_weight.addmm_(grad_logits.T, hidden)
            else:
                grad_weight += grad_logits.T @ hidden
        del grad_logits  # before the next chunk has its own
    return loss, grad_hidden, grad_weight if grad_weight is None else grad_weight.to(weight.dtype)


def _of_chunk(
    hidden: Tensor, weight: Tensor, target: Tensor, scales: Tensor, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    """The loss of a chunk of tokens, and the gradient of its logits: ``(softmax - one-hot) scales``; empty without.

    Args:
        hidden, weight: (rows, d), (V, d) of one dtype, that of the gradient.
        target, scales: (rows, 1).
    """
    logits = F.linear(hidden, weight).float()
    # Softmax in place: the exponentials of logits less their row's largest, and their sum.
    logits -= logits.amax(-1, keepdim=True)
    target_logits = logits.gather(-1, target)
    total = logits.exp_().sum(-1, keepdim=True)
    loss = ((total.log() - target_logits) * scales).sum()
    if not with_gradient:
        return loss, logits.new_empty(0)
    share = scales / total
    grad_target = (target_logits.exp() - total) * share
    gradient = logits.mul_(share).to(hidden.dtype)
    return loss, gradient.scatter_(-1, target, grad_target.to(hidden.dtype))


def _fused(weight: Tensor) -> OfChunk:
    """:func:`_of_chunk` for the device of ``weight``: compiled on CUDA, where it passes ten times over floats."""
    if hardware.kind_of(weight) != "cuda" or torch.compiler.is_compiling():
        return _of_chunk
    problem = hardware.compiler_problem()
    if problem is None:
        return compiled_chunk()
    say_once(f"the loss is not compiled, and slower for it: {problem}")
    return _of_chunk


@functools.cache
def compiled_chunk() -> OfChunk:
    say_once("the loss of training is compiled once, which takes seconds")
    return torch.compile(_of_chunk, fullgraph=True)


def _most_rows(weight: Tensor) -> int:
    """Tokens of a chunk."""
    vocab_size, hidden_size = weight.shape
    most = max(1, CHUNK_LOGITS // vocab_size)
    if hardware.kind_of(weight) != "cpu":
        return most
    # Below twice the width, adding up the weight's gradient once a chunk costs more than the caches save.
    return min(most, max(CACHED_LOGITS // vocab_size, 2 * hidden_size))
