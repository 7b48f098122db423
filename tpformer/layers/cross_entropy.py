"""Cross entropy over logits whose vocabulary is split over tp: local pass, one collective, local pass."""

from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpformer.collectives import gather_stack
from tpformer.mesh import Mesh
from tpformer_kernels import ELSEWHERE, IGNORED, Backend, cross_entropy_gradient, cross_entropy_statistics

Reduction = Literal["mean", "sum", "none"]


class LossOptions(TypedDict, total=False):
    """The keyword arguments of both losses; those left out have the values of `Loss`."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float
    reduction: Reduction
    vocab_size: int | None
    backend: Backend


@dataclass(frozen=True)
class Loss:
    """What is computed from logits of which each tp rank has `width` columns.

    Raises ValueError for values out of range.
    """

    mesh: Mesh
    width: int
    ignore_index: int = -100
    label_smoothing: float = 0.0
    """How much of the target is spread evenly over the whole vocabulary."""
    z_loss: float = 0.0
    """Weight of lse², which holds the logits near 0."""
    softcap: float = 0.0
    """If not 0, a logit x counts as softcap · tanh(x / softcap)."""
    reduction: Reduction = "mean"
    vocab_size: int | None = None
    """Real size of the whole vocabulary: columns beyond it are padding and take no part."""
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        whole = self.width * self.mesh.tp.size
        if not 0 < self.vocabulary <= whole:
            raise ValueError(f"vocab_size ({self.vocab_size}) must be in 1..{whole}, the columns of all ranks")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(f"label_smoothing ({self.label_smoothing}) must be in 0..1")
        for name, value in (("z_loss", self.z_loss), ("softcap", self.softcap)):
            if value < 0:
                raise ValueError(f"{name} ({value}) must not be negative")
        if self.reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction ({self.reduction!r}) must be mean, sum or none")

    @property
    def vocabulary(self) -> int:
        """Tokens in the whole vocabulary, without padding."""
        return self.width * self.mesh.tp.size if self.vocab_size is None else self.vocab_size

    @property
    def columns(self) -> int:
        """Real columns in this rank's slice."""
        return min(max(self.vocabulary - self.mesh.tp.rank * self.width, 0), self.width)

    def local_targets(self, targets: Tensor) -> Tensor:
        """Ids of the whole vocabulary (n) -> columns of this rank's slice, ELSEWHERE or IGNORED.

        Raises ValueError, on CPU, for a target outside the vocabulary.
        """
        counts = targets != self.ignore_index
        wrong = counts & ((targets < 0) | (targets >= self.vocabulary))
        if targets.device.type != "cpu" or torch.compiler.is_compiling():
            torch._assert_async(~wrong.any())  # no wait for the device
        elif wrong.any():  # no rank owns it, so that its loss would silently be wrong
            position = int(wrong.nonzero()[0])
            raise ValueError(
                f"target {int(targets[position])} at position {position} must be in 0..{self.vocabulary - 1} "
                f"(vocab_size {self.vocabulary}) or ignore_index ({self.ignore_index})"
            )
        local = targets - self.mesh.tp.rank * self.width
        local = local.where((local >= 0) & (local < self.columns), ELSEWHERE)
        return local.where(counts, IGNORED)

    def statistics(self, logits: Tensor, local: Tensor) -> Tensor:
        """The numbers of this slice that the ranks exchange, (n, 3 or 4)."""
        smooth = self.label_smoothing > 0
        return cross_entropy_statistics(logits, local, self.columns, smooth, softcap=self.softcap, backend=self.backend)

    def combine(self, stats: Tensor, local: Tensor) -> tuple[Tensor, Tensor]:
        """Every slice's statistics (tp, n, 3 or 4) -> each token's loss, 0 if ignored, and log-sum-exp, both (n)."""
        top = stats[..., 0].amax(dim=0)
        lse = (stats[..., 1] * (stats[..., 0] - top).exp()).sum(dim=0).log() + top
        losses = lse - (1 - self.label_smoothing) * stats[..., 2].sum(dim=0)
        if self.label_smoothing > 0:
            losses = losses - self.label_smoothing / self.vocabulary * stats[..., 3].sum(dim=0)
        if self.z_loss > 0:
            losses = losses + self.z_loss * lse.square()
        return losses.masked_fill(local == IGNORED, 0.0), lse

    def gradient(self, logits: Tensor, local: Tensor, lse: Tensor, scale: Tensor, inplace: bool) -> Tensor:
        """The gradient of sum(scale · losses) with respect to this slice of the logits, (n, v/tp); scale (n)."""
        weights = (
            scale * (1 + 2 * self.z_loss * lse),
            scale * (1 - self.label_smoothing),
            scale * (self.label_smoothing / self.vocabulary),
        )
        return cross_entropy_gradient(
            logits, local, self.columns, lse, weights, softcap=self.softcap, inplace=inplace, backend=self.backend
        )

    def factor(self, local: Tensor, dtype: torch.dtype) -> Tensor:
        """What the sum of the losses is multiplied by: 1 or, in a mean, 1 / the tokens that count."""
        counting = (local != IGNORED).sum() if self.reduction == "mean" else local.new_ones(())
        return 1 / counting.clamp(min=1).to(dtype)


def vocab_parallel_cross_entropy(
    logits: Tensor, targets: Tensor, mesh: Mesh = Mesh(), *, inplace: bool = False, **options: Unpack[LossOptions]
) -> Tensor:
    """Negative log-likelihood in nats; by default its mean over the targets that are not ignored, 0 if all are.

    logits[..., V_tp], targets[...] int64 with ids of the whole vocabulary, the same on every tp rank.
    inplace: backward writes the gradient over the logits, which nobody may use again. options: see LossOptions;
    ignore_index=-100, label_smoothing=0, z_loss=0, softcap=0, reduction="mean", vocab_size=None, backend="auto".
    Raises ValueError for sizes that do not fit and, on CPU, for a target outside the vocabulary.
    """
    if tuple(targets.shape) != tuple(logits.shape[:-1]):
        raise ValueError(f"targets {tuple(targets.shape)} must have the shape of logits {tuple(logits.shape)} less V")
    loss = Loss(mesh, logits.shape[-1], **options)
    result = _VocabParallelCrossEntropy.apply(logits, loss.local_targets(targets.flatten()), loss, inplace)
    return result.view(targets.shape) if loss.reduction == "none" else result


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, local: Tensor, loss: Loss, inplace: bool) -> Tensor:
        stats = loss.statistics(logits.flatten(0, -2), local)
        losses, lse = loss.combine(gather_stack(stats, loss.mesh.tp), local)  # the one collective
        factor = loss.factor(local, lse.dtype)
        ctx.loss, ctx.inplace, ctx.spent = loss, inplace, False
        ctx.save_for_backward(logits, local, lse, factor)
        return losses if loss.reduction == "none" else losses.sum() * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.spent:
            raise RuntimeError("backward through an in-place loss a second time: its logits hold the gradient now")
        ctx.spent = ctx.inplace
        logits, local, lse, factor = ctx.saved_tensors
        scale = (grad * factor).masked_fill(local == IGNORED, 0.0)  # (n)
        flat = logits.flatten(0, -2)
        inplace = ctx.inplace and flat.stride(-1) == 1
        return ctx.loss.gradient(flat, local, lse, scale, inplace).view_as(logits), None, None, None
