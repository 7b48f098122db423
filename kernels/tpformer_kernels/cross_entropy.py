"""The two local passes of a vocabulary-parallel cross entropy: statistics of a slice, then its gradient.

Between them one collective combines the statistics of all slices. No fp32 copy of the logits outlives a
chunk of rows. Sources: arXiv 1805.02867 (online softmax); NVIDIA TransformerEngine (one packed exchange).
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def cross_entropy_statistics(logits: Tensor, targets: Tensor, columns: int, with_sum: bool) -> Tensor:
    """What the loss needs to know of this slice of the logits, a row of numbers for each token.

    logits (n, v), of which the first `columns` are real; targets (n), the column in this slice or -1 if it
    lies in another -> (n, 3 or 4), fp32 or fp64: max, sum of exp(x - max), target's logit (0 if elsewhere), and
    with_sum the sum of the logits. A slice of padding only gives max -inf and sums 0.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    stats = torch.zeros(logits.shape[0], 4 if with_sum else 3, dtype=wide, device=logits.device)
    stats[:, 0] = -torch.inf
    for rows in _chunks(logits) if columns else ():
        x = logits[rows, :columns].to(wide)
        out, target = stats[rows], targets[rows]
        top = x.amax(dim=-1, keepdim=True)
        out[:, 0:1] = top
        out[:, 2] = x.gather(1, target.clamp(min=0).unsqueeze(1)).squeeze(1).where(target >= 0, 0.0)
        if with_sum:
            out[:, 3] = x.sum(dim=-1)
        # a row that is -inf throughout has no finite maximum to subtract
        out[:, 1] = x.sub(top.clamp(min=torch.finfo(wide).min)).exp_().sum(dim=-1)
    return stats


def cross_entropy_gradient(
    logits: Tensor, targets: Tensor, columns: int, lse: Tensor, weights: tuple[Tensor, Tensor, Tensor], out: Tensor
) -> Tensor:
    """Write a·softmax(x) - c, less b at the target, to `out` (n, v), which may be `logits` itself.

    lse (n): log of the sum over the whole vocabulary; weights = (a, b, c), each (n). Padding columns get 0.
    """
    for rows in _chunks(logits) if columns else ():
        x = logits[rows, :columns].to(lse.dtype)  # no copy in fp32 and fp64
        y = out[rows, :columns] if out.dtype == lse.dtype else x
        a, b, c = (w[rows].unsqueeze(1) for w in weights)
        target = targets[rows].unsqueeze(1)
        torch.sub(x, lse[rows].unsqueeze(1), out=y).exp_().mul_(a).sub_(c)
        y.scatter_add_(1, target.clamp(min=0), -b.where(target >= 0, 0.0))
        if y is x and out.dtype != lse.dtype:
            out[rows, :columns] = y
    out[:, columns:] = 0.0
    return out


def _chunks(logits: Tensor) -> Iterator[slice]:
    """Slices of rows that fit the cache on a CPU, and a modest buffer elsewhere."""
    budget = 1 << 20 if logits.device.type == "cpu" else 1 << 28  # bytes
    step = max(1, budget // (4 * logits.shape[1]))
    for start in range(0, logits.shape[0], step):
        yield slice(start, start + step)
