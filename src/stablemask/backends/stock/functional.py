"""The operators under ``torch.func``: ``vmap``, ``grad``, ``vmap(grad(...))``, ``jacrev``.

``vmap`` folds its axis into the batch. A custom operator's registered derivative is an autograd function
of the older form, which ``torch.func`` refuses; those here are of the newer form, around the same
operators and the same derivative.
"""

import torch
from torch import Tensor

from ..calls import refuse_second_order
from . import operators


class _Forward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        return operators.flash_forward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        operators.save_for_backward(ctx, inputs, output)

    @staticmethod
    def backward(ctx, d_out, d_lse):
        return operators.differentiate(ctx, d_out, d_lse, _Backward.apply)


class _Backward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        return operators.flash_backward(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        refuse_second_order(ctx, *grads)


flash_forward = _Forward.apply


def _vmap_forward(info, in_dims, *arguments):
    return _in_batch(operators.flash_forward, info.batch_size, in_dims, arguments, num_batched=5)


def _vmap_backward(info, in_dims, *arguments):
    return _in_batch(operators.flash_backward, info.batch_size, in_dims, arguments, num_batched=7)


def _in_batch(operator, size, in_dims, arguments, num_batched):
    """Run an operator once, the vmapped axis folded into the batch of every tensor."""
    *leading, slopes, window, documents, past, scale, kernel = arguments
    if in_dims[num_batched] is not None:
        raise NotImplementedError(
            "vmap over alibi_slopes is not supported; loop, or add a head axis"
        )
    tensors = [*leading, documents]
    dims = [*in_dims[:num_batched], in_dims[num_batched + 2]]
    batch = next(
        t.shape[0] if d is None else t.movedim(d, 0).shape[1] for t, d in zip(tensors, dims)
    )
    folded = [_fold(tensor, dim, size, batch) for tensor, dim in zip(tensors, dims)]
    results = operator(*folded[:-1], slopes, window, folded[-1], past, scale, kernel)
    return tuple(r.unflatten(0, (size, -1)) for r in results), (0,) * len(results)


def _fold(tensor: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    if tensor is None or (dim is None and tensor.shape[0] == 1 and batch != 1):
        return tensor  # broadcast over the batch, and so over the larger one
    tensor = tensor.unsqueeze(0) if dim is None else tensor.movedim(dim, 0)
    return tensor.expand(size, batch, *tensor.shape[2:]).flatten(0, 1)


operators.flash_forward.register_vmap(_vmap_forward)
operators.flash_backward.register_vmap(_vmap_backward)
