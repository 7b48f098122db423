"""Cases of attention, and the same in other words: pair by pair, in fp64, by torch's softmax."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tests.kernels.support import DEVICE, TOLERANCE, Result, assert_near, doubled, evaluate, guarded, small_tables
from tpformer_kernels import AttentionOptions, Backend, attention_with_lse, random_columns

PLACE = ((1 << 63) + 12345, 7, 3)
PLAIN, CAUSAL = AttentionOptions(), AttentionOptions(causal=True)
EVERYTHING = AttentionOptions(causal=True, scale=0.3, window=20, softcap=2.0, dropout=0.3, place=PLACE)


@dataclass(frozen=True)
class Shape:
    """b sequences of sq queries and sk keys."""

    b: int = 2
    heads: int = 2
    kv_heads: int = 1
    sq: int = 35
    sk: int = 35
    d: int = 16

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k and v."""
        sizes = ((self.heads, self.sq), (self.kv_heads, self.sk), (self.kv_heads, self.sk))
        q, k, v = (torch.randn(self.b, *size, self.d, dtype=torch.float64) for size in sizes)
        return q.to(DEVICE, dtype), k.to(DEVICE, dtype), v.to(DEVICE, dtype)


def sees(shape: Shape, options: AttentionOptions, key_mask: Tensor | None, ends: list[int] | None) -> Tensor:
    """Which query sees which key, asked pair by pair: (b, sq, sk)."""
    window, shift = options.window or shape.sq + shape.sk, shape.sk - shape.sq

    def one(b: int, i: int, j: int) -> bool:
        near = (j <= i + shift or not options.causal) and abs(i + shift - j) < window
        same = ends is None or sum(end <= i for end in ends) == sum(end <= j for end in ends)
        return near and same and (key_mask is None or bool(key_mask[b, j]))

    rows = [[[one(b, i, j) for j in range(shape.sk)] for i in range(shape.sq)] for b in range(shape.b)]
    return torch.tensor(rows, dtype=torch.bool, device=DEVICE).view(shape.b, shape.sq, shape.sk)


def kept(shape: Shape, options: AttentionOptions, ends: list[int] | None) -> Tensor:
    """What dropout keeps, word by word: (b, heads, sq, sk)."""
    seed, sample, head = options.place
    heads = head + torch.arange(shape.heads).view(-1, 1)

    def of(queries: int, keys: int, samples: Tensor) -> Tensor:
        words = random_columns(seed, (torch.arange(queries), samples.view(-1, 1, 1), heads), 0, keys)
        return words >= round(options.dropout * 2**32)

    if ends is None:
        return of(shape.sq, shape.sk, sample + torch.arange(shape.b)).to(DEVICE)
    lengths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    blocks = [of(n, n, torch.tensor([sample + i])) for i, n in enumerate(lengths)]
    whole = torch.zeros(1, shape.heads, shape.sq, shape.sk, dtype=torch.bool)
    for block, end in zip(blocks, ends, strict=True):
        whole[:, :, end - block.shape[2] : end, end - block.shape[2] : end] = block
    return whole.to(DEVICE)


def expected(
    shape: Shape, options: AttentionOptions, key_mask: Tensor | None = None, ends: list[int] | None = None
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Attention and lse in torch's own ops, of (q, k, v) in fp64; lse is 0 where nothing is seen, to be compared."""
    seen, group = sees(shape, options, key_mask, ends).unsqueeze(1), shape.heads // shape.kv_heads
    drawn = kept(shape, options, ends).double() / (1 - options.dropout) if options.dropout else 1.0

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (torch.stack([x[:, h // group] for h in range(shape.heads)], dim=1) for x in (k, v))
        scores = torch.einsum("bhid,bhjd->bhij", q, k) * (options.scale or shape.d**-0.5)
        scores = options.softcap * torch.tanh(scores / options.softcap) if options.softcap else scores
        exponentials = scores.exp() * seen
        total = exponentials.sum(-1, keepdim=True)
        blind = total == 0
        probabilities = exponentials / (total + blind) * drawn
        return torch.einsum("bhij,bhjd->bhid", probabilities, v), (total + blind).log().squeeze(-1)

    return torchs


def ours(options: AttentionOptions, backend: Backend = "triton", **others: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    """attention_with_lse, where what sees nothing, whose lse must be -inf, is 0."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = attention_with_lse(q, k, v, options, backend=backend, **others)
        return o, lse.masked_fill(lse == -torch.inf, 0.0)

    return run


def exact(torchs: Callable[..., Any], inputs: tuple[Tensor, ...], result: Result) -> Result:
    """The same in fp64, of the same numbers."""
    return evaluate(torchs, [doubled(x) for x in inputs], 3, [doubled(x) for x in result.cotangents])


def prove(
    shape: Shape,
    options: AttentionOptions,
    dtype: torch.dtype = torch.float32,
    key_mask: Tensor | None = None,
    ends: list[int] | None = None,
) -> None:
    """The kernels' numbers, of guarded memory, are those of torch's own ops."""
    cu = None if ends is None else torch.tensor([0, *ends], dtype=torch.int32, device=DEVICE)
    with small_tables(), guarded() as guard:
        inputs = tuple(guard.copy(x) for x in shape.inputs(dtype))
        result = evaluate(ours(options, key_mask=key_mask, cu_seqlens=cu), inputs, 3)
    assert [x.dtype for x in result.outputs] == [dtype, torch.float32]
    assert all(guard.owns(x) for x in result.gradients)
    assert_near(result, exact(expected(shape, options, key_mask, ends), inputs, result), TOLERANCE[dtype])


OPTIONS: dict[str, AttentionOptions] = {
    "plain": PLAIN,
    "causal": CAUSAL,
    "scale": AttentionOptions(scale=0.5),
    "window of 1": AttentionOptions(causal=True, window=1),
    "window": AttentionOptions(causal=True, window=18),
    "window, not causal": AttentionOptions(window=6),
    "window of all": AttentionOptions(window=1 << 20),
    "softcap": AttentionOptions(softcap=1.5),
    "dropout": AttentionOptions(dropout=0.3, place=PLACE),
    "everything": EVERYTHING,
    "everything, not causal": replace(EVERYTHING, causal=False),
}
SHAPES: dict[str, Shape] = {
    "one of each": Shape(1, 1, 1, 1, 1),
    "one query": Shape(2, 2, 2, 1, 37),
    "one key": Shape(1, 2, 1, 19, 1),
    "blocks": Shape(1, 2, 2, 32, 48),
    "more keys": Shape(1, 4, 2, 17, 33),
    "more queries": Shape(1, 2, 1, 35, 18),
}
