"""What several backends, and the choice among them, ask of a call."""

import functools
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from ..call import Call
from ..masks import requires_grad

Function = TypeVar("Function", bound=Callable)
TINY = torch.finfo(torch.float32).tiny


def needs_gradient(call: Call) -> bool:
    """Whether autograd will ask for a backward of this call."""
    if not (call.watched and torch.is_grad_enabled()):
        return False
    query, key, value, sink_logits, masks, *_ = call
    return (
        requires_grad(query)
        or requires_grad(key)
        or requires_grad(value)
        or (isinstance(sink_logits, Tensor) and requires_grad(sink_logits))
        or masks.need_gradient
    )


def nothing_watches() -> bool:
    """Whether a kernel may be called as it is: no gradient, transform or compiler."""
    return not (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


def with_positive_scale(query: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores by a scale above 0, for kernels that hide later keys, as -inf, before they scale."""
    if scale < 0:
        query, scale = -query, -scale
    if scale < TINY:  # which kernels may take for 0
        query, scale = query * scale, 1.0
    return query, scale


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def _is_batch(tensor: Tensor | None) -> bool:
    """Whether ``torch.autograd.grad(..., is_grads_batched=True)`` is behind it."""
    return tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor)


def only_autograd_watches(*tensors: Tensor | None) -> bool:
    """Whether an operator may give way to what it is made of: plain tensors, in eager mode, in no mode."""
    return (
        not torch.compiler.is_compiling()
        and all(type(tensor) in _PLAIN and not _is_batch(tensor) for tensor in tensors)
        and not under_torch_func()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch.autograd.forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
    )


# Asked once: the compiler of PyTorch 2.9 cannot trace the question.
_WITH_AUTOCAST = frozenset(
    device
    for device in ("cpu", "cuda", "hpu", "mps", "mtia", "xla", "xpu")
    if torch.amp.is_autocast_available(device)
)


def autocast_is_on(device: str) -> bool:
    """Whether autocast is enabled for a type of device."""
    return device in _WITH_AUTOCAST and torch.is_autocast_enabled(device)


def sink_gradient(sink_logits: Tensor, lse: Tensor, d_total: Tensor) -> Tensor:
    """The gradient of sink logits, summed over what was broadcast.

    Args:
        lse: (B, H, n), with the sink in it.
        d_total: (B, H, n), the gradient of ``lse``: ``-rowsum(grad * out)``, and what a loss adds.
    """
    # An infinite sink has taken the whole row; its out, and so its gradient, is 0.
    share = torch.exp(sink_logits.to(lse.dtype) - lse).nan_to_num(nan=1.0)
    return (share * d_total).sum_to_size(sink_logits.shape).to(sink_logits.dtype)


@functools.cache
def say_once(message: str) -> None:
    """A warning that is given once in a process."""
    warnings.warn(message, stacklevel=2)


def refuse_second_order(ctx, *grads):
    raise RuntimeError(
        "the flash kernels cannot be differentiated twice; use backend='reference' for "
        "second-order gradients"
    )


def constant_while_compiling(function: Function) -> Function:
    """Have the compiler call a function and take its result for a constant, rather than trace it.

    That is all ``torch.compiler.assume_constant_result`` does; calling it would import the compiler,
    for seconds, with this package.
    """
    function.__dict__["_dynamo_marked_constant"] = True
    return function


@constant_while_compiling  # the compiler of PyTorch 2.9 says yes in its own graphs too
def is_exporting() -> bool:
    """Whether ``torch.export`` is tracing."""
    return torch.compiler.is_exporting()


@constant_while_compiling  # a compiler is in the transforms of what it traces
def under_torch_func() -> bool:
    """Whether a transform of ``torch.func`` is active."""
    return torch._C._are_functorch_transforms_active()
