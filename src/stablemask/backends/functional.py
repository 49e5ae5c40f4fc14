"""The operators under ``torch.func``: ``grad``, ``vmap(grad(...))``, ``jacrev``.

A custom operator's registered derivative is an autograd function of the older form, which ``torch.func``
refuses. These are of the newer form, around the same operators and the same derivative.
"""

import torch

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
        operators.refuse_second_order(ctx, *grads)


flash_forward = _Forward.apply
