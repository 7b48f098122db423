"""Triton kernels of the two passes of cross_entropy.py, and their launches as operators of torch."""

import torch
from torch import Tensor

from tpformer_kernels.jit import jit, tl, triton
from tpformer_kernels.library import launch, operator, rows_of
from tpformer_kernels.tables import options


def _empty_statistics(logits: Tensor, targets: Tensor, columns: int, with_sum: bool, softcap: float) -> Tensor:
    return logits.new_empty(logits.shape[0], 4 if with_sum else 3, dtype=torch.float32)


@operator(
    "cross_entropy_statistics(Tensor logits, Tensor targets, int columns, bool with_sum, float softcap) -> Tensor",
    _empty_statistics,
)
def statistics(logits: Tensor, targets: Tensor, columns: int, with_sum: bool, softcap: float) -> Tensor:
    """One program a row; of few rows several a row, whose parts are combined here in a fixed order."""
    logits, tokens = rows_of(logits), logits.shape[0]
    meta = options("cross_entropy_statistics", columns, logits.device)
    programs, block = meta.pop("PROGRAMS"), meta["BLOCK"]
    splits = max(1, min(programs // max(tokens, 1), triton.cdiv(columns, 4 * block)))
    width = triton.cdiv(triton.cdiv(columns, splits), block) * block
    parts = logits.new_empty(tokens, splits, 4 if with_sum else 3, dtype=torch.float32)
    pointers = (logits, targets.contiguous(), parts, logits.stride(0))
    flags = {"CAPPED": softcap != 0, "NUMBERS": parts.shape[2]}
    launch(_statistics_kernel, (tokens, splits), *pointers, columns, width, softcap, **flags, **meta)
    if splits == 1:
        return parts.squeeze(1)
    top = parts[..., 0].amax(1, keepdim=True)
    scale = (parts[..., 0] - top.clamp(min=torch.finfo(torch.float32).min)).exp()
    sums = (parts[..., 1] * scale).sum(1, keepdim=True)
    return torch.cat([top, sums, parts[..., 2:].sum(1)], dim=1)


ARGUMENTS = "Tensor targets, int columns, Tensor lse, Tensor a, Tensor b, Tensor c, float softcap"


@operator(f"cross_entropy_gradient_(Tensor(a!) logits, {ARGUMENTS}) -> ()", lambda *arguments: None)
def gradient_(
    logits: Tensor, targets: Tensor, columns: int, lse: Tensor, a: Tensor, b: Tensor, c: Tensor, softcap: float
) -> None:
    _write_gradient(logits, logits, (targets, lse, a, b, c), columns, softcap)


@operator(f"cross_entropy_gradient(Tensor logits, {ARGUMENTS}) -> Tensor", lambda x, *others: x.new_empty(x.shape))
def gradient(
    logits: Tensor, targets: Tensor, columns: int, lse: Tensor, a: Tensor, b: Tensor, c: Tensor, softcap: float
) -> Tensor:
    out = logits.new_empty(logits.shape)
    _write_gradient(rows_of(logits), out, (targets, lse, a, b, c), columns, softcap)
    return out


def _write_gradient(logits: Tensor, out: Tensor, vectors: tuple[Tensor, ...], columns: int, softcap: float) -> None:
    if logits.stride(1) != 1 and logits.shape[1] > 1:  # only in place: a copy would not be the logits
        raise ValueError(f"the rows of logits that are overwritten must be contiguous, not of stride {logits.stride()}")
    tokens, width = logits.shape
    meta = options("cross_entropy_gradient", width, logits.device)
    grid = (tokens, triton.cdiv(width, meta["BLOCK"]))
    vectors = tuple(x.contiguous() for x in vectors)
    strides = (logits.stride(0), out.stride(0))
    launch(
        _gradient_kernel, grid, logits, out, *vectors, *strides, columns, width, softcap, CAPPED=softcap != 0, **meta
    )


@jit
def _statistics_kernel(
    logits_ptr,
    targets_ptr,
    parts_ptr,
    stride,
    columns,
    width,
    softcap,
    CAPPED: tl.constexpr,
    NUMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: `width` columns of one row, online: whenever the maximum rises, what was summed is scaled down."""
    row = tl.program_id(0).to(tl.int64)
    out = parts_ptr + (row * tl.num_programs(1) + tl.program_id(1)) * NUMBERS
    target = tl.load(targets_ptr + row)
    floor = -3.4028234663852886e38  # a finite start, so that -inf - top is never NaN
    top, sums = floor, tl.where(tl.program_id(1) == 0, 1.0, 0.0)
    target_logit, plain_sum = 0.0, 0.0
    if target != -2:  # of an ignored token nothing is read
        first = tl.program_id(1) * width
        last = tl.minimum(first + width, columns)
        exponentials = tl.zeros((BLOCK,), tl.float32)
        plain = tl.zeros((BLOCK,), tl.float32)
        for start in range(first, last, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + row * stride + column, column < last, -float("inf")).to(tl.float32)
            if CAPPED:
                x = tl.where(column < last, softcap * (2 * tl.sigmoid(2 * x / softcap) - 1), -float("inf"))
            higher = tl.maximum(top, tl.max(x, 0))
            exponentials = exponentials * tl.exp(top - higher) + tl.exp(x - higher)
            top = higher
            if NUMBERS == 4:
                plain += tl.where(column < last, x, 0.0)
        sums = tl.sum(exponentials, 0)
        plain_sum = tl.sum(plain, 0)
        if (target >= first) & (target < last):
            target_logit = tl.load(logits_ptr + row * stride + target).to(tl.float32)
            if CAPPED:
                target_logit = softcap * (2 * tl.sigmoid(2 * target_logit / softcap) - 1)
        top = tl.where(top == floor, -float("inf"), top)
    else:
        top = 0.0
    tl.store(out, top)
    tl.store(out + 1, sums)
    tl.store(out + 2, target_logit)
    if NUMBERS == 4:
        tl.store(out + 3, plain_sum)


@jit
def _gradient_kernel(
    logits_ptr,
    out_ptr,
    targets_ptr,
    lse_ptr,
    a_ptr,
    b_ptr,
    c_ptr,
    stride,
    out_stride,
    columns,
    width,
    softcap,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK columns of one row, read and written once; in place, out_ptr is logits_ptr."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + row)
    y = tl.zeros((BLOCK,), tl.float32)
    if target != -2:
        x = tl.load(logits_ptr + row * stride + column, column < columns, 0.0).to(tl.float32)
        if CAPPED:
            x = softcap * (2 * tl.sigmoid(2 * x / softcap) - 1)
        y = tl.load(a_ptr + row) * tl.exp(x - tl.load(lse_ptr + row)) - tl.load(c_ptr + row)
        y -= tl.where(column == target, tl.load(b_ptr + row), 0.0)
        if CAPPED:
            y *= 1 - (x / softcap) * (x / softcap)
        y = tl.where(column < columns, y, 0.0)
    tl.store(out_ptr + row * out_stride + column, y.to(out_ptr.dtype.element_ty), column < width)
