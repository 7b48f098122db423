"""What attention is: its options, which query sees which key, and the definition in plain torch."""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from tpformer_kernels.philox import random_columns


@dataclass(frozen=True)
class AttentionOptions:
    """Scores are scale · q·k, or softcap · tanh(scale · q·k / softcap). Raises ValueError for what is none.

    Of sq queries and sk keys query i stands at i + sk - sq: the last query at the last key.
    """

    causal: bool = False
    """A query sees no key after it."""
    scale: float | None = None
    """Above 0; 1 / sqrt(head_dim) if None."""
    window: int | None = None
    """A query sees only keys less than this far from it."""
    softcap: float = 0.0
    """0: none."""
    dropout: float = 0.0
    """Probability that a softmax probability becomes 0; the others are divided by 1 - dropout."""
    place: tuple[int, int, int] = (0, 0, 0)
    """(seed below 2^64, global number of the first sample, of the first head): where the mask of dropout is drawn."""

    def __post_init__(self) -> None:
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"scale ({self.scale}) must be above 0")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window ({self.window}) must be at least 1")
        if not self.softcap >= 0:
            raise ValueError(f"softcap ({self.softcap}) must be at least 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout ({self.dropout}) must be at least 0 and below 1")

    def scale_for(self, head_dim: int) -> float:
        return self.scale if self.scale is not None else head_dim**-0.5


def seen_keys(queries: int, keys: int, options: AttentionOptions, device: torch.device) -> Tensor:
    """True where a query (row) sees a key (column): not after it, and within the window; (sq, sk)."""
    position = torch.arange(queries, device=device) + (keys - queries)
    distance = position.unsqueeze(1) - torch.arange(keys, device=device)
    seen = distance >= 0 if options.causal else torch.ones_like(distance, dtype=torch.bool)
    if options.window is not None:
        seen = seen & (distance < options.window) & (distance > -options.window)
    return seen


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, key_mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, in fp32 or fp64: (b, heads, sq, d) in q's dtype, and the log of the sums, (b, heads, sq)."""
    if cu_seqlens is not None:
        return _packed(q, k, v, options, cu_seqlens)
    wide = torch.promote_types(q.dtype, torch.float32)
    group, queries, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = (x.to(wide) if group == 1 else x.to(wide).repeat_interleave(group, dim=1) for x in (k, v))
    scores = q.to(wide) @ k.transpose(2, 3) * options.scale_for(q.shape[3])
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    seen = seen_keys(queries, keys, options, q.device)
    if key_mask is not None:
        seen = seen & key_mask[:, None, None]
    blind = ~seen.any(-1, keepdim=True)  # sees no key: its scores become 0, so that nothing is NaN
    scores = scores.masked_fill(~seen, -torch.inf).masked_fill(blind, 0.0)
    probabilities = scores.softmax(-1).masked_fill(blind, 0.0)
    lse = scores.logsumexp(-1).masked_fill(blind.squeeze(-1), -torch.inf)
    if options.dropout:
        kept = kept_probabilities((*q.shape[:3], keys), options, q.device)
        probabilities = (probabilities * (1 / (1 - options.dropout))).masked_fill(~kept, 0.0)
    return (probabilities @ v).to(q.dtype), lse


def _packed(q: Tensor, k: Tensor, v: Tensor, options: AttentionOptions, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Sequence by sequence, each a sample of its own."""
    seed, sample, head = options.place
    ends = cu_seqlens.tolist()
    parts = []
    for i, (start, end) in enumerate(pairwise(ends)):
        own = replace(options, place=(seed, sample + i, head))
        at = slice(start, end)
        parts.append(attention_reference(q[:, :, at], k[:, :, at], v[:, :, at], own, None, None))
    outputs, lses = zip(*parts, strict=True)
    return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)


def kept_probabilities(shape: tuple[int, ...], options: AttentionOptions, device: torch.device) -> Tensor:
    """What dropout keeps of probabilities (b, heads, sq, sk): where word c % 4 of a Philox call is not too small.

    Its counter for query r and key c is (c // 4, r, sample, head), by global numbers.
    """
    samples, heads, queries, keys = shape
    seed, first_sample, first_head = options.place
    sample = first_sample + torch.arange(samples, device=device).view(-1, 1, 1)
    head = first_head + torch.arange(heads, device=device).view(-1, 1)
    words = random_columns(seed, (torch.arange(queries, device=device), sample, head), 0, keys)
    return words >= round(options.dropout * 2**32)
