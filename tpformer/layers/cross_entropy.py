"""Cross entropy over logits whose vocabulary is split over tp: local pass, one collective, local pass."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpformer.collectives import gather_stack
from tpformer.mesh import Mesh
from tpformer_kernels import cross_entropy_gradient, cross_entropy_statistics


@dataclass(frozen=True)
class _Options:
    mesh: Mesh
    vocab_size: int  # of the whole vocabulary, without padding
    columns: int  # real columns in this rank's slice
    label_smoothing: float
    z_loss: float
    inplace: bool


def vocab_parallel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    mesh: Mesh = Mesh(),
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    vocab_size: int | None = None,
    inplace: bool = False,
) -> Tensor:
    """Mean negative log-likelihood in nats over the targets that are not ignored; 0 if all are.

    logits[..., V_tp], targets[...] int64 with ids of the whole vocabulary, the same on every tp rank.
    label_smoothing spreads that much of the target evenly over the *whole* vocabulary; z_loss adds z·lse².
    vocab_size: real size of the whole vocabulary; columns beyond it are padding and take no part.
    inplace: backward writes the gradient over the logits, which nobody may use again.
    Raises ValueError for sizes that do not fit and, on CPU, for a target outside the vocabulary.
    """
    width = logits.shape[-1]
    vocab_size = width * mesh.tp.size if vocab_size is None else vocab_size
    if tuple(targets.shape) != tuple(logits.shape[:-1]):
        raise ValueError(f"targets {tuple(targets.shape)} must have the shape of logits {tuple(logits.shape)} less V")
    if not 0 < vocab_size <= width * mesh.tp.size:
        raise ValueError(f"vocab_size ({vocab_size}) must be in 1..{width * mesh.tp.size}, the columns of all ranks")
    columns = min(max(vocab_size - mesh.tp.rank * width, 0), width)
    options = _Options(mesh, vocab_size, columns, label_smoothing, z_loss, inplace)
    targets = targets.flatten()
    _check_targets(targets, ignore_index, vocab_size)
    return _VocabParallelCrossEntropy.apply(logits, targets, targets != ignore_index, options)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, counts: Tensor, options: _Options) -> Tensor:
        tp, smoothing = options.mesh.tp, options.label_smoothing
        flat = logits.flatten(0, -2)  # (n, v/tp)
        local = targets - tp.rank * flat.shape[1]
        local = local.where(counts & (local >= 0) & (local < options.columns), -1)
        stats = cross_entropy_statistics(flat, local, options.columns, with_sum=smoothing > 0)
        stats = gather_stack(stats, tp)  # (tp, n, 3 or 4): the one collective
        top = stats[..., 0].amax(dim=0)
        lse = (stats[..., 1] * (stats[..., 0] - top).exp()).sum(dim=0).log() + top  # (n)
        loss = lse - (1 - smoothing) * stats[..., 2].sum(dim=0)
        if smoothing > 0:
            loss = loss - smoothing / options.vocab_size * stats[..., 3].sum(dim=0)
        if options.z_loss > 0:
            loss = loss + options.z_loss * lse.square()
        share = counts.to(lse.dtype) / counts.sum().clamp(min=1)  # each token's weight in the mean
        ctx.options, ctx.spent = options, False
        ctx.save_for_backward(logits, local, lse, share)
        return loss.where(counts, 0.0).mul_(share).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.spent:
            raise RuntimeError("backward through an in-place loss a second time: its logits hold the gradient now")
        options: _Options = ctx.options
        ctx.spent = options.inplace
        logits, local, lse, share = ctx.saved_tensors
        scale = share * grad
        weights = (
            scale * (1 + 2 * options.z_loss * lse),
            scale * (1 - options.label_smoothing),
            scale * (options.label_smoothing / options.vocab_size),
        )
        flat = logits.flatten(0, -2)
        out = flat if options.inplace else torch.empty_like(flat)
        return (
            cross_entropy_gradient(flat, local, options.columns, lse, weights, out).view_as(logits),
            None,
            None,
            None,
        )


def _check_targets(targets: Tensor, ignore_index: int, vocab_size: int) -> None:
    """No rank owns a target outside the vocabulary, so that its loss would silently be wrong."""
    wrong = ((targets < 0) | (targets >= vocab_size)) & (targets != ignore_index)
    if targets.device.type != "cpu":
        torch._assert_async(~wrong.any())  # no wait for the device
    elif wrong.any():
        position = int(wrong.nonzero()[0])
        raise ValueError(
            f"target {int(targets[position])} at position {position} must be in 0..{vocab_size - 1} "
            f"(vocab_size {vocab_size}) or ignore_index ({ignore_index})"
        )
