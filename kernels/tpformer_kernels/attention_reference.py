"""What attention is: its options, which query sees which key, and the definition in plain torch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tpformer_kernels.philox import random_columns
from tpformer_kernels.softmax import softmax


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
) -> Tensor:
    """The definition, in fp32 or fp64: (b, heads, sq, d) in q's dtype."""
    if cu_seqlens is not None:
        parts = _sequences((q, k, v), options, cu_seqlens)
        return torch.cat([attention_reference(q, k, v, own, None, None) for (q, k, v), own in parts], dim=2)
    mask = _seen(q, k, replace(options, causal=False), key_mask)
    probabilities = softmax(_scores(q, k, options), causal=options.causal, mask=mask, backend="torch")
    if options.dropout:
        kept = _kept(probabilities, options)
        probabilities = (probabilities * (1 / (1 - options.dropout))).masked_fill(~kept, 0.0)
    return (probabilities @ _expanded(v, q)).to(q.dtype)


def lse_reference(
    q: Tensor, k: Tensor, options: AttentionOptions, key_mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """The log of the sum of each query's exponentials, (b, heads, sq), in fp32 or fp64; -inf where it sees no key."""
    if cu_seqlens is not None:
        parts = _sequences((q, k), options, cu_seqlens)
        return torch.cat([lse_reference(q, k, own, None, None) for (q, k), own in parts], dim=2)
    scores, seen = _scores(q, k, options), _seen(q, k, options, key_mask)
    if seen is None:
        return scores.logsumexp(-1)
    blind = ~seen.any(-1)  # its scores become 0, so that no gradient is NaN
    scores = scores.masked_fill(~seen, -torch.inf).masked_fill(blind.unsqueeze(-1), 0.0)
    return scores.logsumexp(-1).masked_fill(blind, -torch.inf)


def _scores(q: Tensor, k: Tensor, options: AttentionOptions) -> Tensor:
    """(b, heads, sq, sk), before any mask."""
    scores = q.to(torch.promote_types(q.dtype, torch.float32)) @ _expanded(k, q).transpose(2, 3)
    scores = scores * options.scale_for(q.shape[3])
    return options.softcap * torch.tanh(scores / options.softcap) if options.softcap else scores


def _seen(q: Tensor, k: Tensor, options: AttentionOptions, key_mask: Tensor | None) -> Tensor | None:
    """Which key each query sees, to be broadcast to the scores; None: all see all."""
    seen = None
    if options.causal or options.window is not None:
        seen = seen_keys(q.shape[2], k.shape[2], options, q.device)
    if key_mask is not None:
        keys = key_mask[:, None, None]
        seen = keys if seen is None else seen & keys
    return seen


def _expanded(x: Tensor, q: Tensor) -> Tensor:
    """KV heads repeated for the query heads of their groups, in fp32 or fp64."""
    x, group = x.to(torch.promote_types(x.dtype, torch.float32)), q.shape[1] // x.shape[1]
    return x if group == 1 else x.repeat_interleave(group, dim=1)


def _sequences(
    tensors: tuple[Tensor, ...], options: AttentionOptions, cu_seqlens: Tensor
) -> Iterator[tuple[Any, AttentionOptions]]:
    """Each packed sequence of each tensor, and its options: it is a sample of its own."""
    seed, sample, head = options.place
    for i, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        yield tuple(x[:, :, start:end] for x in tensors), replace(options, place=(seed, sample + i, head))


def _kept(probabilities: Tensor, options: AttentionOptions) -> Tensor:
    """What dropout keeps of (b, heads, sq, sk): where word c % 4 of a Philox call is not too small.

    Its counter for query r and key c is (c // 4, r, sample, head), by global numbers.
    """
    samples, heads, queries, keys = probabilities.shape
    seed, first_sample, first_head = options.place
    device = probabilities.device
    sample = first_sample + torch.arange(samples, device=device).view(-1, 1, 1)
    head = first_head + torch.arange(heads, device=device).view(-1, 1)
    words = random_columns(seed, (torch.arange(queries, device=device), sample, head), 0, keys)
    return words >= round(options.dropout * 2**32)
