"""What `compile_only` compiles: for each key of the tables the operators that ask for it, with every flag they have."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from tests.kernels import compile_matmul
from tests.kernels.compile_attention import ATTENTION
from tpformer_kernels import library
from tpformer_kernels.jit import jit, tl
from tpformer_kernels.norm_kernels import WIDE_BACKWARD, WIDE_FORWARD
from tpformer_kernels.softmax import WIDE

OPS: Any = torch.ops.tpformer


class Case(NamedTuple):
    """How a key of the tables is compiled: call(rows, size, dtype, **flags) calls the operators that ask for it."""

    call: Callable[..., object]
    flags: dict[str, tuple[Any, ...]]
    """All values of each flag; the first is the one that costs most."""
    last: int = 1 << 16
    """The largest size that the last row serves."""
    launches: Callable[[int], Iterator[tuple[Any, ...]]] | None = None
    """The calls on an architecture, of a case that is no key of the tables."""
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    any_shape: bool = True
    """Also fp16, one row and odd sizes; a key that differs from another in its tiles only leaves that to it."""


def norm_forward(rows: int, size: int, dtype: torch.dtype, residual: bool, bias: bool, center: bool) -> None:
    x, weight = torch.empty(rows, size, dtype=dtype), torch.empty(size, dtype=dtype)
    OPS.norm_forward(x, x if residual else None, weight, weight if bias else None, 1e-5, center)


def norm_backward(
    rows: int, size: int, dtype: torch.dtype, total: bool, center: bool, with_weight: bool, with_bias: bool
) -> None:
    x, statistic = torch.empty(rows, size, dtype=dtype), torch.empty(rows, 1)
    weight = torch.empty(size, dtype=dtype)
    OPS.norm_backward(x, x if total else None, x, weight, statistic, statistic, center, with_weight, with_bias)


def rope(rows: int, size: int, dtype: torch.dtype, heads: tuple[int, int], pack: bool, inverse: bool) -> None:
    kv_heads, group = heads
    cos = torch.empty(rows, 1, size // 2)
    q, k = torch.empty(1, rows, kv_heads, group, size, dtype=dtype), torch.empty(1, rows, kv_heads, size, dtype=dtype)
    if pack:
        OPS.rope_pack(q.flatten(2, 3), k, k, cos, cos)
    else:
        OPS.rope(q, k, cos, cos, inverse)


def gated(rows: int, size: int, dtype: torch.dtype, activation: int) -> None:
    pairs = torch.empty(1, 2 * size, dtype=dtype)
    OPS.gated_backward(OPS.gated_forward(pairs, activation), pairs, activation)


def bias_gelu(rows: int, size: int, dtype: torch.dtype, tanh: bool, bias: bool, with_bias: bool) -> None:
    x, vector = torch.empty(rows, size, dtype=dtype), torch.empty(size, dtype=dtype) if bias else None
    OPS.bias_gelu_backward(OPS.bias_gelu_forward(x, vector, tanh), x, vector, tanh, with_bias)


def dropout_add(rows: int, size: int, dtype: torch.dtype, residual: bool) -> None:
    x = torch.empty(1, rows, size, dtype=dtype)
    OPS.dropout_add(x, x if residual else None, 0.1, 1, 2, 3)


def cross_entropy(rows: int, size: int, dtype: torch.dtype, softcap: float, with_sum: bool, inplace: bool) -> None:
    logits, vector, targets = torch.empty(rows, size, dtype=dtype), torch.empty(rows), torch.zeros(rows).long()
    OPS.cross_entropy_statistics(logits, targets, size, with_sum, softcap)
    gradient = OPS.cross_entropy_gradient_ if inplace else OPS.cross_entropy_gradient
    gradient(logits, targets, size, vector, vector, vector, vector, softcap)


def softmax(rows: int, size: int, dtype: torch.dtype, mask: torch.dtype | None, causal: bool) -> None:
    x = torch.empty(2, rows, size, dtype=dtype)
    OPS.softmax_forward(x, None if mask is None else torch.empty(size, dtype=mask).expand(x.shape), 0.5, causal)
    OPS.softmax_backward(x, x, 0.5, causal)


@jit
def _spilling_kernel(x_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """One warp sorts out far more numbers than it has registers."""
    column = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + column, column < size, 0.0)
    x -= tl.sum(x, 0)
    tl.store(x_ptr + column, x, column < size)


@jit
def _sharing_kernel(x_ptr, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A matmul that keeps more tiles in flight than shared memory holds."""
    row = tl.arange(0, BLOCK)
    product = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, size, BLOCK):
        tile = tl.load(x_ptr + row[:, None] * size + start + row[None, :])
        product = tl.dot(tile, tl.load(x_ptr + (start + row[:, None]) * size + row[None, :]), product)
    tl.store(x_ptr + row[:, None] * size + row[None, :], product.to(x_ptr.dtype.element_ty))


def spilling(rows: int, size: int, dtype: torch.dtype) -> None:
    library.launch(_spilling_kernel, (1,), torch.empty(size, dtype=dtype), size, BLOCK=1 << 14, num_warps=1)


def sharing(rows: int, size: int, dtype: torch.dtype) -> None:
    library.launch(_sharing_kernel, (1,), torch.empty(16), size, BLOCK=128, num_warps=8, num_stages=5)


BOTH = (True, False)
NORM_FORWARD = {"residual": BOTH, "bias": BOTH, "center": BOTH}
NORM_BACKWARD = {"total": BOTH, "center": BOTH, "with_weight": BOTH, "with_bias": BOTH}
GATED = {"activation": (1, 2, 0)}
BIAS_GELU = {"tanh": (False, True), "bias": BOTH, "with_bias": BOTH}
SOFTMAX = {"mask": (torch.float32, torch.bool, None), "causal": BOTH}
CROSS_ENTROPY = {"softcap": (30.0, 0.0), "with_sum": BOTH, "inplace": BOTH}

CASES: dict[str, Case] = {
    # first, because they take longest
    **{
        f"matmul {numbers}": Case(
            compile_matmul.matmul, {}, launches=functools.partial(compile_matmul.launches, numbers=numbers)
        )
        for numbers in compile_matmul.DTYPES
    },
    "norm_forward": Case(norm_forward, NORM_FORWARD, last=WIDE_FORWARD),
    "norm_forward_wide": Case(norm_forward, NORM_FORWARD),
    "norm_backward": Case(norm_backward, NORM_BACKWARD, last=WIDE_BACKWARD),
    "norm_backward_wide": Case(norm_backward, NORM_BACKWARD),
    "norm_weight_wide": Case(norm_backward, NORM_BACKWARD),
    "rope": Case(rope, {"heads": ((8, 4), (8, 1), (1, 8), (1, 1)), "pack": BOTH, "inverse": BOTH}, last=256),
    "gated_forward": Case(gated, GATED),
    "gated_backward": Case(gated, GATED),
    "bias_gelu_forward": Case(bias_gelu, BIAS_GELU),
    "bias_gelu_backward": Case(bias_gelu, BIAS_GELU),
    "dropout_add": Case(dropout_add, {"residual": BOTH}),
    "softmax_forward": Case(softmax, SOFTMAX, last=WIDE),
    "softmax_forward_wide": Case(softmax, SOFTMAX),
    "softmax_backward": Case(softmax, SOFTMAX, last=WIDE),
    "softmax_backward_wide": Case(softmax, SOFTMAX),
    "cross_entropy_statistics": Case(cross_entropy, CROSS_ENTROPY),
    "cross_entropy_gradient": Case(cross_entropy, CROSS_ENTROPY),
    **{name: Case(call, flags, last, dtypes=dtypes) for name, (call, flags, last, dtypes) in ATTENTION.items()},
}
CONTROLS = {"spilling": Case(spilling, {}), "sharing": Case(sharing, {})}
"""What must be complained about."""
