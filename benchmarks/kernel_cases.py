"""What the kernel benchmark measures: ops, shapes, random inputs, and the least that each has to move or multiply.

Bytes are the algorithm's: each input read once, each output written once. What an implementation moves beyond that,
and what it keeps for backward besides its inputs, is its own affair and lowers its rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import attention_providers
from benchmarks import kernel_providers as providers
from benchmarks.kernel_providers import Leaves, Provider

DIRECTIONS = ("forward", "backward", "both")
CE_VOCAB, LINEAR_CE_VOCAB = 131072, 128256
TABLE_BYTES = 4  # the rotation tables are fp32


@dataclass(frozen=True)
class Size:
    """Shapes of one model, as far as the ops need them."""

    label: str
    tokens: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int = 128
    vocab: int | None = None
    """Instead of the two that the targets name."""
    main: bool = True
    """Whether the targets are about this size; the others are there for the plot."""


LLAMA_8B = Size("8b", 8192, 4096, 14336, 32, 8)
LLAMA_70B = Size("70b", 8192, 8192, 28672, 64, 8)
SWEEP = tuple(Size("8b", tokens, 4096, 14336, 32, 8, main=False) for tokens in (256, 1024, 4096))
LENGTHS = tuple(
    Size(f"{n // 1024}k x {d}", n, 4096, 14336, 4096 // d, 8, d, main=n > 4096)
    for d in (64, 128)
    for n in (4096, 8192, 16384)
)
"""For attention: head_dims and lengths."""
TINY = tuple(Size("tiny", tokens, 64, 96, 4, 2, 16, vocab=211, main=tokens == 32) for tokens in (8, 32))
"""For a CPU: they show that the script works, not what the ops can do."""


@dataclass(frozen=True)
class Source:
    """Random tensors for one set of inputs."""

    generator: torch.Generator
    dtype: torch.dtype

    @classmethod
    def seeded(cls, seed: int, dtype: torch.dtype, device: torch.device) -> Source:
        """The same numbers for the same seed."""
        return cls(torch.Generator(device).manual_seed(seed), dtype)

    def normal(self, *shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        """Normal numbers."""
        device = self.generator.device
        return torch.randn(shape, generator=self.generator, dtype=self.dtype, device=device).mul_(std).add_(mean)

    def integers(self, below: int, *shape: int) -> Tensor:
        """Integers from 0."""
        return torch.randint(below, shape, generator=self.generator, device=self.generator.device)


@dataclass(frozen=True)
class Case:
    """One op at one size."""

    op: str
    size: Size
    shape: dict[str, int]
    dtype: torch.dtype
    make: Callable[[Source], Leaves]
    providers: tuple[Provider, ...]
    forward_bytes: int
    backward_bytes: int
    flops: int = 0
    """Of forward and backward, for an op that arithmetic bounds."""
    backward_flops: int = 0
    """Those of them that are backward's, where it is timed for itself."""
    whole: bool = False
    """Forward and backward are only timed together."""
    overwritten: bool = False
    """The first leaf is written over, and is restored before each call."""

    @property
    def directions(self) -> tuple[str, ...]:
        """What is timed."""
        return ("both",) if self.whole else DIRECTIONS

    def bytes_of(self, direction: str) -> int:
        """The least that it moves."""
        return (direction != "backward") * self.forward_bytes + (direction != "forward") * self.backward_bytes

    def flops_of(self, direction: str) -> int:
        """The operations that it takes, or 0 for an op that memory bounds."""
        return {"forward": self.flops - self.backward_flops, "backward": self.backward_flops, "both": self.flops}[
            direction
        ]

    @property
    def shape_text(self) -> str:
        """Sizes without their names, in order."""
        return " x ".join(map(str, self.shape.values()))


def norm_bytes(tokens: int, hidden: int, item: int, *, residual: bool, center: bool) -> tuple[int, int]:
    """x, [residual] -> y, [sum]; dy, [dsum], x or sum -> dx; weight, [bias] and their gradients."""
    tensor, vector = tokens * hidden * item, hidden * item * (1 + center)
    return (4 if residual else 2) * tensor + vector, (4 if residual else 3) * tensor + hidden * item + vector


def rope_bytes(tokens: int, size: Size, item: int) -> tuple[int, int]:
    """q, k and the tables -> q, k; dq, dk, dv and the tables -> their packed gradient. Values stay where they are."""
    head, tables = tokens * size.head_dim * item, tokens * size.head_dim * TABLE_BYTES
    return 2 * (size.heads + size.kv_heads) * head + tables, 2 * (size.heads + 2 * size.kv_heads) * head + tables


def gated_bytes(tokens: int, ffn: int, item: int) -> tuple[int, int]:
    """gate, up -> y; dy, gate, up -> dgate, dup."""
    return 3 * tokens * ffn * item, 5 * tokens * ffn * item


def bias_gelu_bytes(tokens: int, ffn: int, item: int) -> tuple[int, int]:
    """x, bias -> y; dy, x, bias -> dx, dbias."""
    return (2 * tokens + 1) * ffn * item, (3 * tokens + 2) * ffn * item


def dropout_add_bytes(tokens: int, hidden: int, item: int) -> tuple[int, int]:
    """x, residual -> y; dy -> dx. The residual's gradient is dy itself."""
    return 3 * tokens * hidden * item, 2 * tokens * hidden * item


def softmax_bytes(rows: int, queries: int, item: int) -> tuple[int, int]:
    """Causal, square: half of x -> y; half of dy and of y -> dx; the zeros beyond the diagonal are written."""
    read = rows * (queries + 1) // 2 * item
    return read + rows * queries * item, 2 * read + rows * queries * item


def cross_entropy_bytes(tokens: int, vocab: int, item: int) -> tuple[int, int]:
    """logits, targets -> one number; logits, targets -> dlogits."""
    return tokens * (vocab * item + 8), tokens * (2 * vocab * item + 8)


def norm_case(op: str, size: Size, dtype: torch.dtype) -> Case:
    """rms_norm, layer_norm, add_rms_norm or add_layer_norm."""
    residual, center = op.startswith("add_"), op.endswith("layer_norm")
    n, d = size.tokens, size.hidden

    def make(source: Source) -> Leaves:
        streams = [source.normal(1, n, d) for _ in range(1 + residual)]
        return *streams, source.normal(d, mean=1.0, std=0.2), *([source.normal(d, std=0.2)] if center else [])

    least = norm_bytes(n, d, dtype.itemsize, residual=residual, center=center)
    return Case(op, size, {"tokens": n, "hidden": d}, dtype, make, providers.norm(residual, center), *least)


def rope_case(op: str, size: Size, dtype: torch.dtype) -> Case:
    """One sequence of all the tokens."""
    n, k = size.tokens, size.head_dim

    def make(source: Source) -> Leaves:
        qkv = source.normal(1, n, size.kv_heads, size.heads // size.kv_heads + 2, k)
        frequencies = 10000.0 ** (-torch.arange(0, k, 2, device=qkv.device) / k)
        angles = torch.outer(torch.arange(n, device=qkv.device), frequencies).unsqueeze(1)
        return qkv, angles.cos(), angles.sin()

    shape = {"tokens": n, "heads": size.heads, "kv_heads": size.kv_heads, "head_dim": k}
    return Case(op, size, shape, dtype, make, providers.rope(), *rope_bytes(n, size, dtype.itemsize))


def gated_case(op: str, size: Size, dtype: torch.dtype) -> Case:
    """SwiGLU."""
    n, f = size.tokens, size.ffn

    def make(source: Source) -> Leaves:
        return (source.normal(1, n, 2 * f),)

    least = gated_bytes(n, f, dtype.itemsize)
    return Case(op, size, {"tokens": n, "ffn": f}, dtype, make, providers.swiglu(), *least)


def bias_gelu_case(op: str, size: Size, dtype: torch.dtype) -> Case:
    """The erf form."""
    n, f = size.tokens, size.ffn

    def make(source: Source) -> Leaves:
        return source.normal(1, n, f), source.normal(f)

    least = bias_gelu_bytes(n, f, dtype.itemsize)
    return Case(op, size, {"tokens": n, "ffn": f}, dtype, make, providers.bias_gelu(), *least)


def dropout_add_case(op: str, size: Size, dtype: torch.dtype) -> Case:
    """A tenth is dropped."""
    n, d = size.tokens, size.hidden

    def make(source: Source) -> Leaves:
        return source.normal(1, n, d), source.normal(1, n, d)

    least = dropout_add_bytes(n, d, dtype.itemsize)
    return Case(op, size, {"tokens": n, "hidden": d}, dtype, make, providers.dropout_add(), *least)


def softmax_case(op: str, size: Size, dtype: torch.dtype) -> Case:
    """Causal, of as many keys as queries."""
    h, n = size.heads, size.tokens

    def make(source: Source) -> Leaves:
        return (source.normal(1, h, n, n),)

    shape = {"heads": h, "queries": n, "keys": n}
    return Case(op, size, shape, dtype, make, providers.softmax(), *softmax_bytes(h * n, n, dtype.itemsize))


def attention_case(op: str, size: Size, dtype: torch.dtype, dropout: float = 0.0) -> Case:
    """Causal, of one sequence: the half of the scores that is seen, in two products, and in five of backward."""
    n, h, kv, d = size.tokens, size.heads, size.kv_heads, size.head_dim

    def make(source: Source) -> Leaves:
        q, k, v = source.normal(1, n, h, d), source.normal(1, n, kv, d), source.normal(1, n, kv, d)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    query, pair, product = n * h * d * dtype.itemsize, 2 * n * kv * d * dtype.itemsize, n * n * h * d
    shape = {"tokens": n, "heads": h, "kv_heads": kv, "head_dim": d}
    least = 2 * query + pair, 4 * query + 2 * pair
    contenders = attention_providers.attention(dropout)
    return Case(op, size, shape, dtype, make, contenders, *least, flops=7 * product, backward_flops=5 * product)


def cross_entropy_case(op: str, size: Size, dtype: torch.dtype, inplace: bool = True) -> Case:
    """Forward and backward together, the gradient over the logits; not in place, each for itself."""
    n, v = size.tokens, size.vocab or CE_VOCAB

    def make(source: Source) -> Leaves:
        # spread wide enough that the gradient is more than the targets' -1
        return source.normal(n, v, std=3.0), source.integers(v, n)

    least = cross_entropy_bytes(n, v, dtype.itemsize)
    shape = {"tokens": n, "vocab": v}
    return Case(
        op, size, shape, dtype, make, providers.cross_entropy(inplace), *least, whole=inplace, overwritten=inplace
    )


def linear_cross_entropy_case(op: str, size: Size, dtype: torch.dtype) -> Case:
    """Forward and backward together: the gradients come about in forward."""
    n, d, v = size.tokens, size.hidden, size.vocab or LINEAR_CE_VOCAB

    def make(source: Source) -> Leaves:
        return source.normal(1, n, d), source.normal(v, d, std=1 / math.sqrt(d)), source.integers(v, 1, n)

    moved = 2 * (n * d + v * d) * dtype.itemsize + 8 * n
    shape = {"tokens": n, "hidden": d, "vocab": v}
    return Case(
        op, size, shape, dtype, make, providers.linear_cross_entropy(), moved, 0, flops=6 * n * d * v, whole=True
    )


BUILDERS: dict[str, Callable[[str, Size, torch.dtype], Case]] = {
    "rms_norm": norm_case,
    "add_rms_norm": norm_case,
    "layer_norm": norm_case,
    "add_layer_norm": norm_case,
    "split_and_rotate": rope_case,
    "gated_activation": gated_case,
    "bias_gelu": bias_gelu_case,
    "dropout_add": dropout_add_case,
    "softmax": softmax_case,
    "attention": attention_case,
    "cross_entropy": cross_entropy_case,
    "linear_cross_entropy": linear_cross_entropy_case,
}


def cases(op: str, device: torch.device, quick: bool) -> list[Case]:
    """One op at every size for the device; quick: without the sweep. fp32 on a CPU, bf16 elsewhere."""
    sizes = TINY if device.type == "cpu" else LENGTHS if op == "attention" else (*SWEEP, LLAMA_8B, LLAMA_70B)
    if "cross_entropy" in op or op == "softmax":  # of the vocabulary's size, not the model's; too large in fp32
        sizes = tuple(size for size in sizes if size is not LLAMA_70B)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return [BUILDERS[op](op, size, dtype) for size in sizes if size.main or not quick]
