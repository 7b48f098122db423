"""The cases and the oracle of the losses: torch's cross entropy of whole fp64 logits, its options written plainly."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.layers.prove import gradient, noise
from tpformer.layers.cross_entropy import LossOptions

B, S, D, V = 2, 8, 6, 24
UPSTREAM = 0.7


@dataclass(frozen=True)
class Case:
    """A loss: its options, how many targets are ignored, and how large its chunks are."""

    options: LossOptions
    ignored: int = 0
    chunk_bytes: int | None = None
    scale: float = 1.0
    lay_out: str = "rows"

    @property
    def vocabulary(self) -> int:
        return self.options.get("vocab_size") or V

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Whole x (b, s, d), weight (v, d) and targets (b, s); rows of padding are large, so that a use shows."""
        x, weight = self.scale * noise("x", B, S, D), noise("weight", V, D)
        weight[self.vocabulary :] = 1e3
        targets = torch.randint(self.vocabulary, (B, S), generator=torch.Generator().manual_seed(3))
        targets.view(-1)[:2] = torch.tensor([0, self.vocabulary - 1])
        targets.view(-1)[B * S - self.ignored :] = self.options.get("ignore_index", -100)
        return x, weight, targets

    def laid_out(self, x: Tensor) -> Tensor:
        """A matrix or more of them, stored by rows, by columns or with the first two dims exchanged."""
        if self.lay_out == "columns":
            return x.flatten(0, -2).t().contiguous().t().unflatten(0, x.shape[:-1])
        return x.transpose(0, 1).contiguous().transpose(0, 1) if self.lay_out == "exchanged" else x

    def upstream(self) -> Tensor:
        """What backward begins with: a number or, without a reduction, a weight for each token, 0 and below too."""
        if self.options.get("reduction") != "none":
            return torch.tensor(UPSTREAM, dtype=torch.float64)
        weights = noise("upstream", B, S)
        weights[0, :3] = 0.0
        return weights


def plain_loss(logits: Tensor, targets: Tensor, options: LossOptions) -> Tensor:
    """The loss of whole logits (b, s, v), term by term."""
    ignore, smoothing = options.get("ignore_index", -100), options.get("label_smoothing", 0.0)
    logits = logits[..., : options.get("vocab_size")]
    if softcap := options.get("softcap", 0.0):
        logits = softcap * torch.tanh(logits / softcap)
    logits, flat = logits.flatten(0, -2), targets.flatten()
    losses = F.cross_entropy(logits, flat, ignore_index=ignore, label_smoothing=smoothing, reduction="none")
    counts = flat != ignore
    losses = losses + options.get("z_loss", 0.0) * logits.logsumexp(-1).square() * counts
    if options.get("reduction", "mean") == "none":
        return losses.view(targets.shape)
    return losses.sum() / (counts.sum().clamp(min=1) if options.get("reduction", "mean") == "mean" else 1)


def reference(case: Case) -> dict[str, Tensor]:
    """Loss and gradients of x and weight, from F.linear and the plain loss, on whole fp64 tensors."""
    x, weight, targets = case.tensors()
    x.requires_grad_()
    weight.requires_grad_()
    loss = plain_loss(F.linear(x, weight), targets, case.options)
    loss.backward(case.upstream())
    return {"loss": loss.detach(), "dx": gradient(x), "dweight": gradient(weight)}


def many_tokens(tokens: int, width: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x (1, tokens, width), weight (vocabulary, width), scaled so that logits are about 1, and targets."""
    x = noise("x", 1, tokens, width).to(dtype).requires_grad_()
    weight = (noise("weight", vocabulary, width) / width**0.5).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(3))
    return x, weight, targets
