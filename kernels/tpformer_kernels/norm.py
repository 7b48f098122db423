"""RMSNorm and LayerNorm, alone or after adding a residual; backward keeps the input and one or two numbers a row.

What is normed leaves in the dtype of x or of the weight, whichever is narrower: matmuls follow.

Sources: arXiv 1910.07467 (RMSNorm), arXiv 1607.06450 (LayerNorm). The kernels are in norm_kernels.py, launched by
norm_ops.py.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpformer_kernels.apply import apply
from tpformer_kernels.backend import Backend, use_triton
from tpformer_kernels.norm_ops import narrower, norm_backward, norm_forward


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: Backend = "auto") -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dim; (..., d), (d) -> (..., d), computed in fp32 or fp64.

    Raises ValueError for a weight of another size than x's last dim.
    """
    return apply(_Norm, x, None, weight, None, eps, False, backend)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """RMSNorm of x + residual, and that sum in the residual's dtype; (..., d), (..., d), (d) -> two of (..., d).

    Raises ValueError for shapes that do not fit each other.
    """
    return apply(_Norm, x, residual, weight, None, eps, False, backend)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: Backend = "auto") -> Tensor:
    """(x - mean) / sqrt(var + eps) · weight + bias over the last dim; (..., d), (d), (d) -> (..., d).

    Raises ValueError for a weight or bias of another size than x's last dim.
    """
    return apply(_Norm, x, None, weight, bias, eps, True, backend)[0]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """LayerNorm of x + residual, and that sum in the residual's dtype; (..., d), (..., d), (d), (d) -> two of (..., d).

    Raises ValueError for shapes that do not fit each other.
    """
    return apply(_Norm, x, residual, weight, bias, eps, True, backend)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        center: bool,
        backend: Backend,
    ) -> tuple[Tensor, Tensor | None]:
        _check_shapes(x, residual, weight, bias)
        ctx.triton, ctx.center = use_triton(backend, x), center
        forward = norm_forward if ctx.triton else norm_forward_reference
        y, total, mean, rstd = forward(x, residual, weight, bias, eps, center)
        ctx.set_materialize_grads(False)
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
        return y, None if residual is None else total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:  # only the sum was used
            return dtotal, dtotal, None, None, None, None, None
        x, weight, mean, rstd = ctx.saved_tensors
        dtype, residual_dtype, bias_dtype = ctx.dtypes
        backward = norm_backward if ctx.triton else norm_backward_reference
        with_weight, with_bias = ctx.needs_input_grad[2], ctx.needs_input_grad[3]
        dx, dweight, dbias = backward(dy, dtotal, x, weight, mean, rstd, ctx.center, with_weight, with_bias)
        return (
            dx.to(dtype) if ctx.needs_input_grad[0] else None,
            dx if residual_dtype is not None and ctx.needs_input_grad[1] else None,
            dweight.to(weight.dtype) if with_weight else None,
            dbias.to(bias_dtype) if with_bias else None,
            None,
            None,
            None,
        )


def norm_forward_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, center: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What norm_forward computes, in plain torch: y, the sum with the residual, and mean and 1/std of each row."""
    total = x if residual is None else (x + residual).to(residual.dtype)
    wide = total.to(torch.promote_types(total.dtype, torch.float32))
    if center:
        # torch's own layer norm wants one dtype for all
        parameters = weight.to(wide.dtype), None if bias is None else bias.to(wide.dtype)
        y, mean, rstd = torch.native_layer_norm(wide, weight.shape, *parameters, eps)
        return y.to(narrower(x, weight)), total, mean, rstd
    rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * rstd).mul_(weight).to(narrower(x, weight)), total, rstd.new_empty(0), rstd


def norm_backward_reference(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    center: bool,
    with_weight: bool,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What norm_backward computes, in plain torch: gradients of x (dtotal included), weight and bias."""
    wide, dy, wide_weight = x.to(rstd.dtype), dy.to(rstd.dtype), weight.to(rstd.dtype)
    dweight = dbias = rstd.new_empty(0)
    if center:
        dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
            dy, wide, weight.shape, mean, rstd, wide_weight, wide_weight, [True, with_weight, with_bias]
        )
    else:
        products = (dy * wide).reshape(-1, x.shape[-1])  # (n, d)
        if with_weight:
            dweight = products.t() @ rstd.reshape(-1)
        c = (products @ wide_weight).view_as(rstd).div_(x.shape[-1])  # mean of dy · weight · x over d
        dx = (dy * wide_weight).mul_(rstd).addcmul_(wide, c.mul_(rstd.pow(3)), value=-1)
    if dtotal is not None:
        dx = dx + dtotal
    return dx.to(x.dtype), dweight, dbias


def _check_shapes(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (x.dim() == 0 or tuple(tensor.shape) != tuple(x.shape[-1:])):
            raise ValueError(f"{name} {tuple(tensor.shape)} must be as long as the last dim of x {tuple(x.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual {tuple(residual.shape)} must have the shape of x {tuple(x.shape)}")
