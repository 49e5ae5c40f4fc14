"""RMSNorm (Zhang and Sennrich, arXiv 1910.07467), which on the CPU has no kernel of its own.

Letters: x the input, w the weight, r = rsqrt(mean(x^2) + eps) of each row, n = x r, so that y = n w.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..backends import hardware
from ..backends.calls import autocast_is_on, under_torch_func


class RMSNorm(nn.RMSNorm):
    """As in PyTorch, but under autocast its result has the dtype of autocast, cast once for all that read it.

    On the CPU, where PyTorch composes it of operators that autograd follows one by one, it trains with
    a backward of its own, in half the time.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self._trains_on_cpu(x):
            normed = _RMSNorm.apply(x, self.weight, self.eps)
        else:
            normed = super().forward(x)
        if autocast_is_on(x.device.type):
            normed = normed.to(torch.get_autocast_dtype(x.device.type))
        return normed

    def _trains_on_cpu(self, x: Tensor) -> bool:
        return (
            hardware.kind_of(x) == "cpu"
            and x.dtype == self.weight.dtype == torch.float32
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not under_torch_func()
        )


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        return (x * r).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        n = x * r
        share = d_y * n
        d_weight = share.reshape(-1, x.shape[-1]).sum(0)
        # d_x = r (w d_y - n mean(w d_y n)): the mean is there because r depends on the whole row.
        mean = (share @ weight).div_(x.shape[-1]).unsqueeze(-1)
        d_x = (d_y * weight).addcmul_(n, mean, value=-1).mul_(r)
        return d_x, d_weight, None
