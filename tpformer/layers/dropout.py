"""Dropout whose mask depends on global positions only: the same at any tp, dp and under sequence parallelism."""

from torch import Tensor

from tpformer.mesh import Mesh
from tpformer.random import Key
from tpformer_kernels import Backend, dropout_add


def check_dropout(p: float, name: str = "dropout") -> None:
    """Raises ValueError unless 0 <= p < 1."""
    if not 0 <= p < 1:
        raise ValueError(f"{name} ({p}) must be at least 0 and below 1")


def residual_dropout(
    x: Tensor, residual: Tensor | None, p: float, key: Key | None, mesh: Mesh, *, backend: Backend = "auto"
) -> Tensor:
    """residual + dropout(x), (b, s, d) or, under sequence parallelism, (b, s/tp, d); no dropout without a key."""
    if p == 0 or key is None:
        return x if residual is None else residual + x
    first = mesh.tp.rank * x.shape[1] if mesh.sequence_parallel else 0
    return dropout_add(x, residual, p, (key.seed, key.sample, first), backend=backend)
