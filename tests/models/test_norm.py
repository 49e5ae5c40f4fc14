"""RMSNorm with its own backward on the CPU, against PyTorch's in float64."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stablemask.models.norm import RMSNorm


def norm_and_input(*shape, dtype=torch.float32):
    norm = RMSNorm(shape[-1], 1e-6).to(dtype)
    nn.init.normal_(norm.weight, mean=1.0, std=0.3)
    return norm, torch.randn(shape, dtype=dtype, requires_grad=True)


def gradients(function, norm, x, d_y, dtype):
    weight, x = (t.detach().to(dtype).requires_grad_() for t in (norm.weight, x))
    out = function(x, (x.shape[-1],), weight, norm.eps)
    return [out, *torch.autograd.grad(out, (x, weight), d_y.to(dtype))]


@pytest.mark.parametrize("shape", [(5,), (1, 1, 8), (3, 7, 48), (2, 257, 192)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_output_and_gradients(shape, scale):
    norm, x = norm_and_input(*shape)
    x = (x.detach() * scale).requires_grad_()
    d_y = torch.randn(shape)
    out = norm(x)
    assert "_RMSNorm" in out.grad_fn.name()
    actual = [out, *torch.autograd.grad(out, (x, norm.weight), d_y)]
    exact = gradients(F.rms_norm, norm, x, d_y, torch.float64)
    stock = gradients(F.rms_norm, norm, x, d_y, torch.float32)
    rounding = torch.finfo(torch.float32).eps
    for ours, theirs, truth in zip(actual, stock, exact):
        allowed = 2 * (theirs.double() - truth).norm() + 4 * rounding * truth.norm()
        assert (ours.double() - truth).norm() <= allowed


def test_zeros_have_a_finite_gradient():
    norm, _ = norm_and_input(2, 8)
    x = torch.zeros(2, 8, requires_grad=True)
    norm(x).sum().backward()
    expected = (norm.weight / norm.eps**0.5).expand(2, 8)
    torch.testing.assert_close(x.grad, expected)


def test_under_autocast_the_result_is_cast_once():
    norm, x = norm_and_input(2, 3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, norm(x).bfloat16())
    out.float().sum().backward()
    assert x.grad.dtype == norm.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_inference_are_pytorchs(dtype):
    norm, x = norm_and_input(2, 3, 8, dtype=dtype)
    assert torch.equal(norm(x), F.rms_norm(x, (8,), norm.weight, norm.eps))
    with torch.no_grad():
        norm, x = norm_and_input(2, 3, 8)
        assert torch.equal(norm(x), F.rms_norm(x, (8,), norm.weight, norm.eps))


def test_transforms_of_torch_func_and_second_derivatives():
    norm, x = norm_and_input(4, 8)
    per_row = torch.func.vmap(torch.func.grad(lambda row: norm(row).square().sum()))(x.detach())
    whole = torch.autograd.grad(norm(x).square().sum(), x)[0]
    torch.testing.assert_close(per_row, whole)
    (gradient,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
