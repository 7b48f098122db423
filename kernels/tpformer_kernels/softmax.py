"""Softmax of scaled and masked attention scores; backward keeps only the result.

Forward reads and writes each score once, backward reads two and writes one. Under a causal mask what lies beyond the
diagonal is not read. The mask is a constant: it gets no gradient.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpformer_kernels.backend import Backend, use_triton
from tpformer_kernels.jit import jit, tl, triton
from tpformer_kernels.library import launch, operator, rows_of
from tpformer_kernels.tables import options

WIDE = 8192
"""Longer rows than this do not fit the registers of a program."""


def softmax(
    x: Tensor, *, scale: float = 1.0, causal: bool = False, mask: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """softmax(scale · x + mask) over the last dim, (..., q, k) -> (..., q, k); a row that sees nothing gives zeros.

    causal: query i sees key j if j <= i + k - q: the last query sees every key. mask broadcasts to x: bool (True may be
    seen) or numbers that are added. Raises ValueError for a mask that does not fit, or that wants a gradient.
    """
    if x.dim() < 2:
        raise ValueError(f"x {tuple(x.shape)} must be (..., q, k)")
    if mask is not None:
        if mask.requires_grad:
            raise ValueError("the mask of a softmax gets no gradient: detach it, or add it to x")
        try:
            mask = mask.expand(x.shape)
        except RuntimeError as error:
            raise ValueError(f"mask {tuple(mask.shape)} must broadcast to x {tuple(x.shape)}") from error
    return _Softmax.apply(x, mask, scale, causal, use_triton(backend, x))


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor | None, scale: float, causal: bool, triton: bool) -> Tensor:
        y = (softmax_forward if triton else softmax_reference)(x, mask, scale, causal)
        ctx.how = scale, causal, triton
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        scale, causal, triton = ctx.how
        if triton:
            return softmax_backward(dy, y, scale, causal), None, None, None, None
        wide = torch.promote_types(y.dtype, torch.float32)
        dy, p = dy.to(wide), y.to(wide)
        return (p * (dy - (dy * p).sum(-1, keepdim=True)) * scale).to(y.dtype), None, None, None, None


def softmax_reference(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """The definition, in plain torch, in fp32 or fp64."""
    scores = x.to(torch.promote_types(x.dtype, torch.float32)) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if causal:
        rows, columns = x.shape[-2:]
        seen = torch.ones(rows, columns, dtype=torch.bool, device=x.device).tril(columns - rows)
        scores = scores.masked_fill(~seen, -torch.inf)
    blind = (scores == -torch.inf).all(dim=-1, keepdim=True)
    return scores.masked_fill(blind, 0.0).softmax(-1).masked_fill(blind, 0.0).to(x.dtype)


def _as_matrix(x: Tensor) -> Tensor:
    """(..., h, q, k) as (b, h, q, k)."""
    return x[None, None] if x.dim() == 2 else x.reshape(x.shape[:-3].numel(), *x.shape[-3:])


@operator(
    "softmax_forward(Tensor x, Tensor? mask, float scale, bool causal) -> Tensor",
    lambda x, mask, scale, causal: x.new_empty(x.shape),
)
def softmax_forward(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    y = x.new_empty(x.shape)
    if x.numel() == 0:
        return y
    queries, columns = x.shape[-2:]
    flat = rows_of(x)
    strides: tuple[int, ...] = (0, 0, 0, 0)
    boolean = mask is not None and mask.dtype == torch.bool
    if mask is not None:
        mask = _as_matrix(mask.view(torch.uint8) if boolean else mask)
        strides = mask.stride()
    heads = x.shape[-3] if x.dim() > 2 else 1
    arguments = (flat, y, mask, flat.stride(0), *strides, len(flat), heads, queries, columns, scale)
    flags = {"CAUSAL": causal, "BOOLEAN": boolean}
    if columns <= WIDE:
        meta = options("softmax_forward", columns, x.device)
        grid = (triton.cdiv(len(flat), meta["BLOCK_ROWS"]),)
        launch(_softmax_forward_kernel, grid, *arguments, **flags, BLOCK=triton.next_power_of_2(columns), **meta)
    else:
        meta = options("softmax_forward_wide", columns, x.device)
        launch(_softmax_forward_wide_kernel, (len(flat),), *arguments, **flags, **meta)
    return y


@operator(
    "softmax_backward(Tensor dy, Tensor y, float scale, bool causal) -> Tensor",
    lambda dy, y, scale, causal: y.new_empty(y.shape),
)
def softmax_backward(dy: Tensor, y: Tensor, scale: float, causal: bool) -> Tensor:
    dx = y.new_empty(y.shape)
    if y.numel() == 0:
        return dx
    queries, columns = y.shape[-2:]
    flat, dy = rows_of(y), rows_of(dy)
    arguments = (dy, flat, dx, dy.stride(0), flat.stride(0), len(flat), queries, columns, scale)
    if columns <= WIDE:
        meta = options("softmax_backward", columns, y.device)
        grid = (triton.cdiv(len(flat), meta["BLOCK_ROWS"]),)
        block = triton.next_power_of_2(columns)
        launch(_softmax_backward_kernel, grid, *arguments, CAUSAL=causal, BLOCK=block, **meta)
    else:
        meta = options("softmax_backward_wide", columns, y.device)
        launch(_softmax_backward_wide_kernel, (len(flat),), *arguments, CAUSAL=causal, **meta)
    return dx


@jit(do_not_specialize=["rows", "queries"])
def _softmax_forward_kernel(
    x_ptr,
    y_ptr,
    mask_ptr,
    x_stride,
    mask_stride_b,
    mask_stride_h,
    mask_stride_q,
    mask_stride_k,
    rows,
    heads,
    queries,
    columns,
    scale,
    CAUSAL: tl.constexpr,
    BOOLEAN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK_ROWS whole rows, in registers."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    seen = inside
    if CAUSAL:
        seen = seen & (column <= row % queries + (columns - queries))
    mask_row = mask_ptr
    if mask_ptr is not None:
        mask_row += (row // queries // heads) * mask_stride_b + (row // queries % heads) * mask_stride_h
        mask_row += row % queries * mask_stride_q
    x = _scores(x_ptr + row * x_stride, mask_row, mask_stride_k, column, seen, scale, BOOLEAN)
    top = tl.max(x, 1, keep_dims=True)
    exponentials = tl.exp(x - tl.where(top == -float("inf"), 0.0, top))
    total = tl.sum(exponentials, 1, keep_dims=True)
    y = exponentials / tl.where(total == 0.0, 1.0, total)
    tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), inside)


@jit
def _scores(x_row, mask_row, mask_stride_k, column, seen, scale, BOOLEAN: tl.constexpr):
    """Scaled and masked scores of some columns, in fp32; -inf for what is not seen, which is not read either."""
    if mask_row is not None and BOOLEAN:
        seen = seen & (tl.load(mask_row + column.to(tl.int64) * mask_stride_k, seen, 0) != 0)
    x = tl.load(x_row + column, seen, 0.0).to(tl.float32) * scale
    if mask_row is not None and not BOOLEAN:
        x += tl.load(mask_row + column.to(tl.int64) * mask_stride_k, seen, 0.0).to(tl.float32)
    return tl.where(seen, x, -float("inf"))


@jit(do_not_specialize=["rows", "queries"])
def _softmax_forward_wide_kernel(
    x_ptr,
    y_ptr,
    mask_ptr,
    x_stride,
    mask_stride_b,
    mask_stride_h,
    mask_stride_q,
    mask_stride_k,
    rows,
    heads,
    queries,
    columns,
    scale,
    CAUSAL: tl.constexpr,
    BOOLEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one row of any length, its scores read twice: for maximum and sum (arXiv 1805.02867), then again."""
    row = tl.program_id(0).to(tl.int64)
    last = columns
    if CAUSAL:
        last = tl.minimum(columns, (row % queries + (columns - queries) + 1).to(tl.int32))
    mask_row = mask_ptr
    if mask_ptr is not None:
        mask_row += (row // queries // heads) * mask_stride_b + (row // queries % heads) * mask_stride_h
        mask_row += row % queries * mask_stride_q
    top = -3.4028234663852886e38  # a finite start, so that -inf - top is never NaN
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, last, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = _scores(x_ptr + row * x_stride, mask_row, mask_stride_k, column, column < last, scale, BOOLEAN)
        higher = tl.maximum(top, tl.max(x, 0))
        sums = sums * tl.exp(top - higher) + tl.exp(x - higher)
        top = higher
    total = tl.sum(sums, 0)
    total = tl.where(total == 0.0, 1.0, total)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = _scores(x_ptr + row * x_stride, mask_row, mask_stride_k, column, column < last, scale, BOOLEAN)
        y = tl.exp(x - top) / total
        tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), column < columns)


@jit(do_not_specialize=["rows", "queries"])
def _softmax_backward_kernel(
    dy_ptr,
    y_ptr,
    dx_ptr,
    dy_stride,
    y_stride,
    rows,
    queries,
    columns,
    scale,
    CAUSAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK_ROWS whole rows, in registers."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < columns)
    seen = inside
    if CAUSAL:
        seen = seen & (column <= row % queries + (columns - queries))
    y = tl.load(y_ptr + row * y_stride + column, seen, 0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_stride + column, seen, 0.0).to(tl.float32)
    dx = scale * y * (dy - tl.sum(y * dy, 1, keep_dims=True))
    tl.store(dx_ptr + row * columns + column, dx.to(dx_ptr.dtype.element_ty), inside)


@jit(do_not_specialize=["rows", "queries"])
def _softmax_backward_wide_kernel(
    dy_ptr,
    y_ptr,
    dx_ptr,
    dy_stride,
    y_stride,
    rows,
    queries,
    columns,
    scale,
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one row of any length, block by block, read a second time from the cache."""
    row = tl.program_id(0).to(tl.int64)
    last = columns
    if CAUSAL:
        last = tl.minimum(columns, (row % queries + (columns - queries) + 1).to(tl.int32))
    products = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, last, BLOCK):
        column = start + tl.arange(0, BLOCK)
        y = tl.load(y_ptr + row * y_stride + column, column < last, 0.0).to(tl.float32)
        products += y * tl.load(dy_ptr + row * dy_stride + column, column < last, 0.0).to(tl.float32)
    product = tl.sum(products, 0)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        y = tl.load(y_ptr + row * y_stride + column, column < last, 0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + column, column < last, 0.0).to(tl.float32)
        dx = scale * y * (dy - product)
        tl.store(dx_ptr + row * columns + column, dx.to(dx_ptr.dtype.element_ty), column < columns)
