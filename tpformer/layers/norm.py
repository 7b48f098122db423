"""RMSNorm and LayerNorm: a copy on every rank, whose gradient is partial under sequence parallelism.

Of a residual stream wider than their weights (fp32, in a bf16 model) they make what the matmuls take.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tpformer.mesh import Mesh
from tpformer.placement import replicated
from tpformer_kernels import Backend, add_layer_norm, add_rms_norm, layer_norm, rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dim (arXiv 1910.07467); x[..., D] -> y[..., D].

    partial_gradient: each rank sees other tokens or heads than its peers (by default: sequence parallelism).
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        *,
        mesh: Mesh = Mesh(),
        partial_gradient: bool | None = None,
        backend: Backend = "auto",
    ):
        super().__init__()
        self.mesh, self.eps, self.backend = mesh, eps, backend
        self.weight = nn.Parameter(torch.ones(dim))
        partial = mesh.sequence_parallel if partial_gradient is None else partial_gradient
        self.placements = {"weight": replicated((dim,), mesh.tp, partial)}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """(..., d) -> (..., d); with a residual the norm of x + residual and that sum, in one pass."""
        if residual is None:
            return rms_norm(x, self.weight, self.eps, backend=self.backend)
        return add_rms_norm(x, residual, self.weight, self.eps, backend=self.backend)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) · weight + bias over the last dim (arXiv 1607.06450); x[..., D] -> y[..., D]."""

    def __init__(self, dim: int, eps: float = 1e-5, *, mesh: Mesh = Mesh(), backend: Backend = "auto"):
        super().__init__()
        self.mesh, self.eps, self.backend = mesh, eps, backend
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        placement = replicated((dim,), mesh.tp, mesh.sequence_parallel)
        self.placements = {"weight": placement, "bias": placement}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        """(..., d) -> (..., d); with a residual the norm of x + residual and that sum, in one pass."""
        if residual is None:
            return layer_norm(x, self.weight, self.bias, self.eps, backend=self.backend)
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps, backend=self.backend)


def add_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """norm(x + residual) and that sum; in one pass where the norm is exactly one of these."""
    if type(norm) in (RMSNorm, LayerNorm):
        return norm(x, residual)
    total = residual + x
    return norm(total), total
