"""rms_norm against torch's own RMSNorm: outputs and gradients, odd sizes, strided inputs, low precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tpformer_kernels import rms_norm

SHAPES = [(1, 1), (1, 7), (5, 1), (3, 2, 15), (2, 3, 16), (2, 17), (2, 3, 2, 33), (8,)]


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, differentiated by autograd."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype) * weight


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_finite_differences(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-3), (x, weight))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=str)
def test_output_and_gradients_are_torch_s(shape: tuple[int, ...], dtype: torch.dtype, rtol: float) -> None:
    x, dy = torch.randn(shape, dtype=dtype, requires_grad=True), torch.randn(shape, dtype=dtype)
    weight = torch.randn(shape[-1], dtype=dtype, requires_grad=True)
    ours, theirs = rms_norm(x, weight, 1e-6), F.rms_norm(x, shape[-1:], weight, 1e-6)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)
    for mine, torchs in zip(
        torch.autograd.grad(ours, (x, weight), dy), torch.autograd.grad(theirs, (x, weight), dy), strict=True
    ):
        torch.testing.assert_close(mine, torchs, rtol=rtol, atol=rtol)


def test_strided_inputs_and_gradients() -> None:
    base = torch.randn(4, 6, 5, dtype=torch.float64)
    dy = torch.randn(5, dtype=torch.float64).expand(5, 6, 5)[:, :, :4]
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    x = base.transpose(0, 2).requires_grad_()  # (5, 6, 4), its last dim is not dense
    assert not x.is_contiguous()
    ours = torch.autograd.grad(rms_norm(x, weight, 1e-5), (x, weight), dy)
    theirs = torch.autograd.grad(reference(x, weight, 1e-5), (x, weight), dy)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def test_bf16_is_computed_in_fp32_and_rounded_once() -> None:
    x = (100 * torch.randn(7, 33)).bfloat16().requires_grad_()
    weight = torch.ones(33, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(7, 33).bfloat16()
    wide = x.detach().double().requires_grad_()
    wide_weight = weight.detach().double().requires_grad_()
    expected = F.rms_norm(wide, (33,), wide_weight, 1e-5)
    y = rms_norm(x, weight, 1e-5)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=0)
    grads = torch.autograd.grad(y, (x, weight), dy)
    for mine, exact in zip(grads, torch.autograd.grad(expected, (wide, wide_weight), dy.double()), strict=True):
        assert mine.dtype == torch.bfloat16
        # one rounding of the result, plus fp32 sums that cancel
        torch.testing.assert_close(mine.double(), exact, rtol=2**-8, atol=1e-5)


def test_zeros_stay_zero_and_their_gradient_finite() -> None:
    x, weight = torch.zeros(2, 5, requires_grad=True), torch.ones(5)
    y = rms_norm(x, weight, 1e-5)
    (dx,) = torch.autograd.grad(y, x, torch.ones(2, 5))
    assert torch.equal(y, torch.zeros(2, 5))
    torch.testing.assert_close(dx, torch.full((2, 5), 1e-5**-0.5))


def test_a_frozen_weight_gets_no_gradient_and_keeps_only_one_number_a_row() -> None:
    x, weight = torch.randn(3, 4, 6, dtype=torch.bfloat16, requires_grad=True), torch.ones(6, dtype=torch.bfloat16)
    y = rms_norm(x, weight, 1e-5)
    saved = y.grad_fn.saved_tensors  # type: ignore[union-attr]
    assert sorted(t.numel() for t in saved if t.numel()) == [6, 12, 72]
    assert any(t.data_ptr() == x.data_ptr() for t in saved)
    y.backward(torch.randn(3, 4, 6).bfloat16())
    assert weight.grad is None
    assert x.grad is not None
