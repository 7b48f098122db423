"""Which dimension of each weight tensor parallelism cuts, for the peers that hold their parts as plain tensors."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

CUT_DIM = {  # the plain model's modules and tpformer's fused ones; the norms are whole on every rank
    **dict.fromkeys(("embedding", "q", "k", "v", "qkv", "gate", "up", "gate_up", "head"), 0),
    **dict.fromkeys(("out", "down"), 1),
}


def cut_dim(name: str) -> int | None:
    """Of the weight called so ("blocks.0.attention.q.weight"); None if every rank has all of it."""
    return CUT_DIM.get(name.split(".")[-2])


def part(name: str, whole: Tensor, rank: int, degree: int) -> Tensor:
    """One rank's part of a weight, in memory of its own."""
    dim = cut_dim(name)
    return whole.clone() if dim is None else whole.chunk(degree, dim)[rank].clone(memory_format=torch.contiguous_format)


def gathered(name: str, local: Tensor) -> Tensor:
    """A whole weight or gradient from every rank's part; collective over the default group."""
    dim = cut_dim(name)
    if dim is None:
        return local
    parts = [torch.empty(local.shape, dtype=local.dtype, device=local.device) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts, dim)
