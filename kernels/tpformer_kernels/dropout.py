"""Dropout, and the residual add after it, from a seed and global positions: no mask is ever stored.

Whichever rank or recomputation asks, the same number falls out. Forward reads two numbers and writes one; backward
reads one and writes one. One Philox call decides four neighbouring columns.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpformer_kernels.backend import Backend, use_triton
from tpformer_kernels.jit import jit, tl, triton
from tpformer_kernels.library import launch, operator, rows_of
from tpformer_kernels.philox import random_columns
from tpformer_kernels.tables import options


def dropout_add(
    x: Tensor, residual: Tensor | None, p: float, place: tuple[int, int, int], *, backend: Backend = "auto"
) -> Tensor:
    """residual + dropout(x), or dropout(x) alone; (b, s, d) -> (b, s, d) in the residual's dtype.

    p: probability that a number becomes 0; the others are divided by 1 - p.
    place: (seed below 2^64, global number of the first sample, global position of the first token); element
    (i, j, c) falls if word c % 4 of Philox counter (c // 4, position + j, sample + i, 0) is below p·2^32.
    Raises ValueError for a p outside [0, 1) or shapes that do not fit.
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout ({p}) must be at least 0 and below 1")
    if x.dim() != 3 or (residual is not None and residual.shape != x.shape):
        shape = None if residual is None else tuple(residual.shape)
        raise ValueError(f"x {tuple(x.shape)} must be (b, s, d), and residual {shape} of the same shape")
    return _DropoutAdd.apply(x, residual, p, place, use_triton(backend, x))


class _DropoutAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, p: float, place: tuple[int, int, int], triton: bool
    ) -> Tensor:
        ctx.how = p, place, triton, x.dtype
        return _drop(x, residual, p, place, triton)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        p, place, triton, dtype = ctx.how
        dx = _drop(dy, None, p, place, triton).to(dtype) if ctx.needs_input_grad[0] else None
        return dx, dy if ctx.needs_input_grad[1] else None, None, None, None


def _drop(x: Tensor, residual: Tensor | None, p: float, place: tuple[int, int, int], triton: bool) -> Tensor:
    if not triton:
        return dropout_add_reference(x, residual, p, place)
    seed, sample, drawn = drawn_at(*place[:2])
    return dropout_add_forward(x, residual, p, seed, sample, place[2], drawn)


def dropout_add_reference(x: Tensor, residual: Tensor | None, p: float, place: tuple[int, int, int]) -> Tensor:
    """The definition, in plain torch."""
    seed, sample, position = place
    samples = sample + torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    positions = position + torch.arange(x.shape[1], device=x.device)
    words = random_columns(seed, (positions, samples, torch.zeros_like(positions)), 0, x.shape[2])
    y = (x * (1 / (1 - p))).masked_fill(words < threshold(p), 0.0)
    return y if residual is None else (y + residual).to(residual.dtype)


def threshold(p: float) -> int:
    """The 32-bit word below which a number falls, with probability p."""
    return min(round(p * 2**32), 2**32 - 1)


def drawn_at(seed: int | Tensor, sample: int | Tensor) -> tuple[int, int, Tensor | None]:
    """Where a mask is drawn, as an operator takes it: the numbers and None, or zeros and a tensor (2) of both.

    Tensors, int64 (), are for torch.compile, to which another number is another program. The seed becomes signed.
    """
    if isinstance(seed, Tensor) and isinstance(sample, Tensor):
        return 0, 0, torch.stack([seed, sample])
    assert isinstance(seed, int)
    assert isinstance(sample, int)
    return signed(seed, 64), sample, None


def signed(n: int, bits: int) -> int:
    """The signed integer with the same bits."""
    return n - (1 << bits) if n >> (bits - 1) & 1 else n


@operator(
    "dropout_add(Tensor x, Tensor? residual, float p, int seed, int sample, int position, Tensor? drawn=None)"
    " -> Tensor",
    lambda x, residual, *place: (x if residual is None else residual).new_empty(x.shape),
)
def dropout_add_forward(
    x: Tensor,
    residual: Tensor | None,
    p: float,
    seed: int,
    sample: int,
    position: int,
    drawn: Tensor | None = None,
) -> Tensor:
    y = (x if residual is None else residual).new_empty(x.shape)
    if y.numel() == 0:
        return y
    if drawn is not None:
        seed, sample = drawn.tolist()
    flat, columns = rows_of(x), x.shape[-1]
    added = None if residual is None else rows_of(residual)
    meta = options("dropout_add", columns, x.device)
    block = min(meta.pop("BLOCK"), max(4, triton.next_power_of_2(columns)))
    grid = (len(flat), triton.cdiv(columns, block))
    strides = (flat.stride(0), 0 if added is None else added.stride(0))
    # every number within 32 bits, so that each value is launched by the same machine code
    words = [signed(n & 0xFFFFFFFF, 32) for n in (seed, seed >> 32, sample, position, threshold(p))]
    scale = 1 / (1 - p)
    launch(_dropout_add_kernel, grid, flat, added, y, *strides, x.shape[1], columns, *words, scale, BLOCK=block, **meta)
    return y


@jit(do_not_specialize=["length", "seed_low", "seed_high", "sample", "position", "threshold"])
def _dropout_add_kernel(
    x_ptr,
    residual_ptr,
    y_ptr,
    x_stride,
    residual_stride,
    length,
    columns,
    seed_low,
    seed_high,
    sample,
    position,
    threshold,
    scale,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK columns of one token."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    four = start // 4 + tl.arange(0, BLOCK // 4)
    seed = (seed_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | seed_low.to(tl.uint32, bitcast=True)
    zero = tl.zeros_like(four)
    s, b = position + (row % length).to(tl.int32), sample + (row // length).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, four, zero + s, zero + b, zero)
    # side by side: word c % 4 of counter c // 4 is column c's
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))
    column = start + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + column, column < columns, 0.0).to(tl.float32)
    kept = words.to(tl.uint32, bitcast=True) >= threshold.to(tl.uint32, bitcast=True)
    y = tl.where(kept, x * scale, 0.0)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + row * residual_stride + column, column < columns, 0.0).to(tl.float32)
    tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), column < columns)
