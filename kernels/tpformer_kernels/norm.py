"""RMSNorm with a backward that keeps only its input and one number a row (arXiv 1910.07467)."""

from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dim; (..., d), (d) -> (..., d), computed in fp32 or fp64."""
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, rstd = ctx.saved_tensors
        normed = x * rstd  # (..., d), fp32 or fp64
        dy = dy.to(rstd.dtype)
        dweight = (dy * normed).reshape(-1, dy.shape[-1]).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        dnormed = dy * weight
        mean = torch.linalg.vecdot(dnormed, normed).unsqueeze(-1).div_(x.shape[-1])
        dx = dnormed.sub_(normed.mul_(mean)).mul_(rstd).to(x.dtype)
        return dx, dweight, None
