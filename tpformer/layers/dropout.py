"""Dropout whose mask depends on global positions only: the same at any tp, dp and under sequence parallelism."""

import torch
from torch import Tensor

from tpformer.mesh import Mesh
from tpformer.random import Key
from tpformer_kernels import Backend, dropout_add, random_columns


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


def attention_dropout(probabilities: Tensor, p: float, key: Key | None, first_head: int) -> Tensor:
    """Dropout on attention probabilities (b, heads/tp, q, k); first_head is the global number of the first one."""
    if p == 0 or key is None:
        return probabilities
    samples, heads, queries, keys = probabilities.shape
    device = probabilities.device
    sample = key.sample + torch.arange(samples, device=device).view(-1, 1, 1)
    head = first_head + torch.arange(heads, device=device).view(-1, 1)
    words = random_columns(key.seed, (torch.arange(queries, device=device), sample, head), 0, keys)
    return (probabilities * (1 / (1 - p))).masked_fill(words < round(p * 2**32), 0.0)
