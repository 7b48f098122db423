"""Launches the norms' kernels, as operators of torch; their references in norm.py compute the same."""

import torch
from torch import Tensor

from tpformer_kernels.jit import triton
from tpformer_kernels.library import launch, operator, rows_of
from tpformer_kernels.norm_kernels import (
    WIDE_BACKWARD,
    WIDE_FORWARD,
    _norm_backward_kernel,
    _norm_backward_wide_kernel,
    _norm_forward_kernel,
    _norm_forward_wide_kernel,
    _norm_weight_wide_kernel,
)
from tpformer_kernels.tables import options

Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def _empty_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, center: bool
) -> Outputs:
    """y, the sum, mean and rstd; one that is not asked for is empty, as none may be an input or another output."""
    statistic = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    total = x.new_empty(0) if residual is None else residual.new_empty(x.shape)
    mean = torch.empty_like(statistic) if center else x.new_empty(0)
    return x.new_empty(x.shape, dtype=narrower(x, weight)), total, mean, statistic


def narrower(x: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of a norm's output: x's, or the weight's if x is wider, as an fp32 residual stream is."""
    return weight.dtype if torch.promote_types(x.dtype, weight.dtype) == x.dtype else x.dtype


@operator(
    "norm_forward(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool center)"
    " -> (Tensor y, Tensor total, Tensor mean, Tensor rstd)",
    _empty_forward,
)
def norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, center: bool
) -> Outputs:
    y, total, mean, rstd = outputs = _empty_forward(x, residual, weight, bias, eps, center)
    if x.numel() == 0:
        return outputs
    flat, columns = rows_of(x), x.shape[-1]
    rows = len(flat)
    added = flat if residual is None else rows_of(residual)
    tensors = (
        flat,
        None if residual is None else added,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
    )
    pointers = (*tensors, y, total, mean, rstd, flat.stride(0), added.stride(0))
    if columns <= WIDE_FORWARD:
        meta = options("norm_forward", columns, x.device)
        grid = (triton.cdiv(rows, meta["BLOCK_ROWS"]),)
        block = triton.next_power_of_2(columns)
        launch(_norm_forward_kernel, grid, *pointers, rows, columns, eps, CENTER=center, BLOCK=block, **meta)
    else:
        meta = options("norm_forward_wide", columns, x.device)
        launch(_norm_forward_wide_kernel, (rows,), *pointers, columns, eps, CENTER=center, **meta)
    return outputs


def _empty_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    center: bool,
    with_weight: bool,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = (x.shape[-1] if asked else 0 for asked in (with_weight, with_bias))
    dweight, dbias = (x.new_empty(length, dtype=torch.float32) for length in lengths)
    return x.new_empty(x.shape), dweight, dbias


@operator(
    "norm_backward(Tensor dy, Tensor? dtotal, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool center,"
    " bool with_weight, bool with_bias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _empty_backward,
)
def norm_backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    center: bool,
    with_weight: bool,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _empty_backward(dy, dtotal, x, weight, mean, rstd, center, with_weight, with_bias)
    if x.numel() == 0:
        return tuple(output.zero_() for output in outputs)  # type: ignore[return-value]
    flat, dy = rows_of(x), rows_of(dy)
    added = dy if dtotal is None else rows_of(dtotal)
    rows, columns = flat.shape
    wide = columns > WIDE_BACKWARD
    meta = options("norm_weight_wide" if wide else "norm_backward", columns, x.device)
    programs = min(meta["PROGRAMS"], triton.cdiv(rows, meta.get("BLOCK_ROWS", 1)))
    parts = [flat.new_empty(programs, columns, dtype=torch.float32) if n else None for n in (with_weight, with_bias)]
    strides = (dy.stride(0), added.stride(0), flat.stride(0))
    pointers = (dy, None if dtotal is None else added, flat, weight.contiguous(), mean if center else None, rstd)
    if wide:
        dx_options = options("norm_backward_wide", columns, x.device)
        launch(_norm_backward_wide_kernel, (rows,), *pointers, outputs[0], *strides, columns, **dx_options)
        if with_weight or with_bias:
            grid = (programs, triton.cdiv(columns, meta["BLOCK"]))
            means = (dy, flat, mean if center else None, rstd)
            launch(_norm_weight_wide_kernel, grid, *means, *parts, strides[0], strides[2], rows, columns, **meta)
    else:
        meta["BLOCK"] = triton.next_power_of_2(columns)
        launch(_norm_backward_kernel, (programs,), *pointers, outputs[0], *parts, *strides, rows, columns, **meta)
    dweight, dbias = (o if part is None else part.sum(0) for part, o in zip(parts, outputs[1:], strict=True))
    return outputs[0], dweight, dbias
