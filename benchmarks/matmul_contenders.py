"""One matmul two ways, by the kernel and by torch with our op behind it: made, checked, and ready to be timed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.kernel_measure import REPEATS, TOLERANCE, WrongResult, compare
from benchmarks.matmul_shapes import Shape
from tpformer_kernels import accumulate_, matmul_ops
from tpformer_kernels.matmul_choice import Choice

OPS: Any = torch.ops.tpformer
Run = Callable[[], tuple[Tensor, ...]]

SILU, GELU_TANH = 0, 4  # numbers of matmul_activated's activations


@dataclass(frozen=True)
class Operands:
    """Random matrices of one shape, as they lie in memory in a model."""

    a: Tensor
    b: Tensor
    bias: Tensor
    residual: Tensor
    total: Tensor


def operands(shape: Shape, dtype: torch.dtype, device: torch.device) -> Operands:
    """Normal numbers: a product of zeros takes less time. b is small, so that sums are about 1."""
    layout, epilogue = shape.kind.split()
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(size, generator=generator, dtype=dtype, device=device)

    m, n, k = shape.m, shape.n, shape.k
    a = normal(m, k) if layout[0] == "n" else normal(k, m).t()
    b = normal(k, n) if layout[1] == "n" else normal(n, k).t()
    residual = normal(m, n) if epilogue == "residual" else normal(0, n)
    total = normal(m, n, dtype=torch.float32) if epilogue == "accumulate" else normal(0, n, dtype=torch.float32)
    return Operands(a, b.mul_(k**-0.5), normal(n), residual, total)


def by_kernel(shape: Shape, x: Operands) -> Run:
    """What the shape's kind says, in one launch."""
    epilogue = shape.kind.split()[1]
    calls: dict[str, Run] = {
        "plain": lambda: (OPS.matmul_forward(x.a, x.b, None, None, False),),
        "bias": lambda: (OPS.matmul_forward(x.a, x.b, x.bias, None, False),),
        "residual": lambda: (OPS.matmul_forward(x.a, x.b, None, x.residual, False),),
        "gelu": lambda: OPS.matmul_activated(x.a, x.b, x.bias, GELU_TANH, False),
        "gated": lambda: OPS.matmul_activated(x.a, x.b, None, SILU, False),
        "accumulate": lambda: _added(OPS.matmul_accumulate_, x),
    }
    return calls[epilogue]


def by_torch(shape: Shape, x: Operands) -> Run:
    """The same in torch's matmul, with its own bias and sum, and our op for an activation."""
    epilogue = shape.kind.split()[1]

    def gelu() -> tuple[Tensor, ...]:
        pre = torch.addmm(x.bias, x.a, x.b)
        return OPS.bias_gelu_forward(pre, None, True), pre

    def gated() -> tuple[Tensor, ...]:
        pre = torch.mm(x.a, x.b)
        return OPS.gated_forward(pre, SILU), pre

    calls: dict[str, Run] = {
        "plain": lambda: (torch.mm(x.a, x.b),),
        "bias": lambda: (torch.addmm(x.bias, x.a, x.b),),
        "residual": lambda: (torch.addmm(x.residual, x.a, x.b),),
        "gelu": gelu,
        "gated": gated,
        "accumulate": lambda: _added(partial(accumulate_, backend="torch"), x),
    }
    return calls[epilogue]


def _added(accumulate: Callable[..., None], x: Operands) -> tuple[Tensor, ...]:
    accumulate(x.total, x.a.t(), x.b, False)
    return (x.total,)


def check(shape: Shape, x: Operands) -> None:
    """Raises WrongResult unless the kernel's results are torch's; both start from the same sum."""
    start = x.total.clone()
    found = tuple(y.clone() for y in by_kernel(shape, x)())
    x.total.copy_(start)
    expected = tuple(y.clone() for y in by_torch(shape, x)())
    x.total.copy_(start)
    for index, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        compare(f"output {index} of {shape.kind}", (mine,), (theirs.float(),), TOLERANCE[x.a.dtype])
    for _ in range(REPEATS):
        again = by_kernel(shape, x)()
        if not all(torch.equal(y, z) for y, z in zip(again, found, strict=True)):
            raise WrongResult(f"{shape.kind} gives other numbers when it is run again")
        x.total.copy_(start)


@contextlib.contextmanager
def launched_in(tile: str, options: dict[str, int]) -> Iterator[None]:
    """Every launch of the kernels uses this tile."""
    choose = matmul_ops.choose

    def chosen(*place: Any, **how: Any) -> Choice:
        return choose(*place, **how)._replace(tile=tile, options=options)

    with patch.object(matmul_ops, "choose", chosen):
        yield
