"""What takes the place of nn.Linear and nn.Embedding in somebody else's module: torch's own products between doors.

Unlike the layers of tpformer.layers they share the sum of their inputs' gradients, as a fused layer would, and follow
torch.autocast, which such modules are often trained in. `tpformer.parallelize` gives them their parameters.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpformer.collectives import enter_parallel, gather_features, leave_parallel
from tpformer.layers.embedding import VocabParallelEmbedding
from tpformer.mesh import Mesh
from tpformer.placement import Placement


class Enter:
    """The door for columns side by side: a tensor that several of them read is entered once, its gradient summed once.

    `forget` is for the module around them to call at its end.
    """

    def __init__(self, mesh: Mesh):
        self.mesh = mesh
        self._last: tuple[Tensor, int, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.mesh.tp.size == 1 or not (x.requires_grad and torch.is_grad_enabled()):
            return x
        if self._last is None or self._last[0] is not x or self._last[1] != x._version:  # or changed in place
            self._last = x, x._version, enter_parallel(x, self.mesh)
        return self._last[2]

    def forget(self, *_: Any) -> None:
        """Let go of the activation."""
        self._last = None


class _Linear(nn.Module):
    weight: nn.Parameter
    bias: nn.Parameter | None
    placements: dict[str, Placement]

    def __init__(self, in_features: int, out_features: int, mesh: Mesh):
        super().__init__()
        self.in_features, self.out_features, self.mesh = in_features, out_features, mesh

    def extra_repr(self) -> str:
        """Of the whole layer."""
        tp = self.mesh.tp.size
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, tp={tp}"
        )


class ColumnLinear(_Linear):
    """x[B, S, D] · W[D, F_tp] -> y[B, S, F_tp]."""

    def __init__(self, in_features: int, out_features: int, mesh: Mesh, enter: Enter):
        super().__init__(in_features, out_features, mesh)
        self.enter = enter

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., f/tp)."""
        return F.linear(self.enter(x), self.weight, self.bias)


class RowLinear(_Linear):
    """x[B, S, D_tp] · W[D_tp, F] -> y[B, S, F] {summed over tp}; the bias is added once, after the sum."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., d/tp) -> (..., f)."""
        if self.mesh.tp.size == 1:
            return F.linear(x, self.weight, self.bias)
        y = leave_parallel(F.linear(x, self.weight), self.mesh)
        return y if self.bias is None else y + self.bias.to(y.dtype)  # under autocast y is narrow


class VocabLinear(_Linear):
    """x[B, S, D] · W[D, V_tp] -> y[B, S, V], gathered: the module around it knows nothing of parts or padding."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., v)."""
        y = F.linear(enter_parallel(x, self.mesh), self.weight, self.bias)
        return gather_features(y, self.mesh.tp)[..., : self.out_features].contiguous()  # some call .view on it


class VocabEmbedding(VocabParallelEmbedding):
    """tokens[B, S] -> x[B, S, D]; as nn.Embedding, it never moves the row of padding_idx."""

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, mesh: Mesh):
        with torch.device("meta"):  # no weights: they are given
            super().__init__(num_embeddings, embedding_dim, mesh=mesh)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 (b, s) -> (b, s, d)."""
        x = super().forward(tokens)
        if self.padding_idx is None:
            return x
        return torch.where((tokens == self.padding_idx).unsqueeze(-1), x.detach(), x)
