"""RMSNorm and LayerNorm: a copy on every rank, whose gradient is partial under sequence parallelism."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpformer.mesh import Mesh
from tpformer.placement import replicated
from tpformer_kernels import rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight over the last dim (arXiv 1910.07467); x[..., D] -> y[..., D].

    partial_gradient: each rank sees other tokens or heads than its peers (by default: sequence parallelism).
    """

    def __init__(self, dim: int, eps: float = 1e-5, *, mesh: Mesh = Mesh(), partial_gradient: bool | None = None):
        super().__init__()
        self.mesh, self.eps = mesh, eps
        self.weight = nn.Parameter(torch.ones(dim))
        partial = mesh.sequence_parallel if partial_gradient is None else partial_gradient
        self.placements = {"weight": replicated((dim,), mesh.tp, partial)}

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + eps) · weight + bias over the last dim (arXiv 1607.06450); x[..., D] -> y[..., D]."""

    def __init__(self, dim: int, eps: float = 1e-5, *, mesh: Mesh = Mesh()):
        super().__init__()
        self.mesh, self.eps = mesh, eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))
        placement = replicated((dim,), mesh.tp, mesh.sequence_parallel)
        self.placements = {"weight": placement, "bias": placement}

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d)."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)
