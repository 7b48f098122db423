"""The two local passes of a vocabulary-parallel cross entropy: statistics of a slice, then its gradient.

Between them one collective combines the statistics of all slices. The first pass reads the logits, the second reads
them and writes the gradient over them: 6 bytes of memory traffic per bf16 logit in all. Their references, in plain
torch, are below; the kernels are in cross_entropy_kernels.py.
Sources: arXiv 1805.02867 (online softmax); NVIDIA TransformerEngine (one packed exchange).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from tpformer_kernels.backend import Backend, use_triton
from tpformer_kernels.cross_entropy_kernels import gradient, gradient_, statistics

ELSEWHERE, IGNORED = -1, -2
"""Targets that are no column of this slice: one in another slice, and one that does not count."""


def cross_entropy_statistics(
    logits: Tensor,
    targets: Tensor,
    columns: int,
    with_sum: bool,
    *,
    softcap: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """What the loss needs to know of this slice of the logits, a row of numbers for each token.

    logits (n, v), of which the first `columns` are real; targets (n), the column in this slice, ELSEWHERE or IGNORED
    -> (n, 3 or 4), fp32 or fp64: max, sum of exp(x - max), target's logit (0 if elsewhere), and with_sum the sum of
    the logits. A slice of padding only gives max -inf and sums 0; an ignored token 0, 1, 0 and 0, unread.
    softcap: if not 0, x is softcap · tanh(logit / softcap). Raises ValueError for shapes that do not fit each other.
    """
    _check_shapes(logits, targets, columns)
    if use_triton(backend, logits):
        return statistics(logits, targets, columns, with_sum, softcap)
    wide = torch.promote_types(logits.dtype, torch.float32)
    stats = torch.zeros(logits.shape[0], 4 if with_sum else 3, dtype=wide, device=logits.device)
    stats[:, 0] = -torch.inf
    for rows in _chunks(logits) if columns else ():
        x = _capped(logits[rows, :columns].to(wide), softcap)
        out, target = stats[rows], targets[rows]
        top = x.amax(dim=-1, keepdim=True)
        out[:, 0:1] = top
        out[:, 2] = x.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1).where(target >= 0, 0.0)
        if with_sum:
            out[:, 3] = x.sum(dim=-1)
        # a row that is -inf throughout has no finite maximum to subtract
        out[:, 1] = x.sub(top.clamp(min=torch.finfo(wide).min)).exp_().sum(dim=-1)
    unread = (torch.arange(stats.shape[1], device=stats.device) == 1).to(wide)  # 0, 1, 0 and 0
    return torch.where((targets == IGNORED).unsqueeze(1), unread, stats)


def cross_entropy_gradient(
    logits: Tensor,
    targets: Tensor,
    columns: int,
    lse: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    *,
    softcap: float = 0.0,
    inplace: bool = False,
    backend: Backend = "auto",
) -> Tensor:
    """a·softmax(x) - c, less b at the target, in the logits' dtype: (n, v), over the logits themselves if inplace.

    lse (n): log of the sum over the whole vocabulary; weights = (a, b, c), each (n). Padding columns and ignored
    tokens get 0. softcap: the gradient is the logits', through the cap. Raises ValueError for shapes that do not fit.
    """
    _check_shapes(logits, targets, columns)
    if any(x.shape != targets.shape for x in (lse, *weights)):
        found = f"lse {tuple(lse.shape)} and weights {[tuple(x.shape) for x in weights]}"
        raise ValueError(f"{found} must have the shape of targets {tuple(targets.shape)}")
    if use_triton(backend, logits):
        if not inplace:
            return gradient(logits, targets, columns, lse, *weights, softcap)
        gradient_(logits, targets, columns, lse, *weights, softcap)
        return logits
    out = logits if inplace else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    for rows in _chunks(logits) if columns else ():
        x = _capped(logits[rows, :columns].to(lse.dtype), softcap)  # no copy in fp32 and fp64
        a, b, c = (w[rows].unsqueeze(1) for w in weights)
        target = targets[rows].unsqueeze(1)
        y = (x - lse[rows].unsqueeze(1)).exp_().mul_(a).sub_(c)
        y.scatter_add_(1, target.clamp(min=0), -b.where(target >= 0, 0.0))
        if softcap:
            y.mul_(1 - (x / softcap).square())
        out[rows, :columns] = y.masked_fill_(target == IGNORED, 0.0)
    out[:, columns:] = 0.0
    return out


def _capped(x: Tensor, softcap: float) -> Tensor:
    return torch.tanh(x / softcap) * softcap if softcap else x


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Slices of rows that fit the cache on a CPU, and a modest buffer elsewhere."""
    budget = 1 << 20 if logits.device.type == "cpu" else 1 << 28  # bytes
    step = max(1, budget // (4 * logits.shape[1]))
    for start in range(0, logits.shape[0], step):
        yield slice(start, start + step)


def _check_shapes(logits: Tensor, targets: Tensor, columns: int) -> None:
    if logits.dim() != 2 or tuple(targets.shape) != tuple(logits.shape[:1]):
        raise ValueError(f"logits {tuple(logits.shape)} must be (n, v) and targets {tuple(targets.shape)} (n)")
    if not 0 <= columns <= logits.shape[1]:
        raise ValueError(f"columns ({columns}) must be in 0..{logits.shape[1]}, the width of the logits")
