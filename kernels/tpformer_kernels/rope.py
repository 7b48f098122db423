"""Rotary position embedding, rotate-half form (arXiv 2104.09864)."""

from typing import Any

import torch
from torch import Tensor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (x[i], x[i + k/2]) of each head by its position's angles.

    x (b, s, h, k), cos and sin (s, 1, k/2) -> (b, s, h, k) contiguous.
    """
    return _Rope.apply(x, cos, sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(dy, cos, sin, -1.0), None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y_first, y_second = y.chunk(2, dim=-1)
    torch.mul(first, cos, out=y_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=y_second).addcmul_(first, sin, value=sign)
    return y
