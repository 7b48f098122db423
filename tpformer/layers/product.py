"""How a linear layer multiplies: what its forward and its backward need to know beside the tensors."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpformer.layers.gradient_sum import GradientSum, gradient_sum, write_products
from tpformer.mesh import Mesh
from tpformer.overlap import overlap_mode
from tpformer_kernels import Backend, matmul


@dataclass(frozen=True)
class Product:
    """How a linear layer multiplies."""

    mesh: Mesh
    backend: Backend
    interleave: int = 1
    """How many outputs share the rows of the weight."""
    activation: str | None = None
    """Returned beside the output."""
    gated: bool = False
    """Of pairs of columns."""
    total: GradientSum | None = None
    """Where the weight's gradient goes, if not to autograd."""

    @staticmethod
    def of(layer: Any, interleave: int = 1, activation: str | None = None) -> "Product":
        """A layer's."""
        total = None if torch.compiler.is_compiling() else gradient_sum(layer.weight)
        gated = activation is not None and getattr(layer, "interleave", 1) == 2
        return Product(layer.mesh, layer.backend, interleave, activation, gated, total)

    def overlaps(self) -> bool:
        """Whether matmuls run beside their own communication."""
        mesh = self.mesh
        return mesh.sequence_parallel and mesh.tp.size > 1 and overlap_mode(mesh) != "plain"

    def weight_gradient(self, weight: Tensor, dys: list[Tensor], x: Tensor) -> Tensor | None:
        """dyᵀ x for autograd; None if it was added to the sum."""
        if self.total is not None:
            self.total.add_products(dys, x, self.backend)
            return None
        if len(dys) == 1:
            return matmul(dys[0].t(), x, backend=self.backend)
        return write_products(torch.empty_like(weight), dys, x, True, self.backend)
