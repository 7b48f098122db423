"""GELU (arXiv 1606.08415) with the bias before it; backward also sums the bias's gradient, in a fixed order.

Forward reads one number and writes one, backward reads two and writes one: the bias costs no pass of its own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from tpformer_kernels.apply import apply
from tpformer_kernels.backend import Backend, use_triton
from tpformer_kernels.gated import activate_block, activate_slope
from tpformer_kernels.jit import jit, tl, triton
from tpformer_kernels.library import launch, operator, rows_of
from tpformer_kernels.tables import options

GELUS = ("gelu", "gelu_tanh")


def bias_gelu(
    x: Tensor,
    bias: Tensor | None,
    activation: str = "gelu",
    *,
    computed: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """gelu(x + bias), bias optional; (..., f), (f) -> (..., f).

    activation: "gelu" (erf) or "gelu_tanh". computed: the result, if matmul_activation gave it (with the bias in x).
    Raises ValueError for another activation, or for a bias of another size.
    """
    if activation not in GELUS:
        raise ValueError(f"activation ({activation!r}) must be one of {', '.join(GELUS)}")
    if x.dim() == 0:
        raise ValueError("x must have at least one dim")
    if bias is not None and tuple(bias.shape) != tuple(x.shape[-1:]):
        raise ValueError(f"bias {tuple(bias.shape)} must be as long as the last dim of x {tuple(x.shape)}")
    if use_triton(backend, x):
        return apply(_BiasGelu, x, bias, activation == "gelu_tanh", computed)
    hidden = x if bias is None else x + bias
    return F.gelu(hidden, approximate="tanh" if activation == "gelu_tanh" else "none").to(x.dtype)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, tanh: bool, computed: Tensor | None) -> Tensor:
        ctx.tanh = tanh
        ctx.save_for_backward(x, bias)
        return bias_gelu_forward(x, bias, tanh) if computed is None else computed.view_as(computed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, bias = ctx.saved_tensors
        with_bias = ctx.needs_input_grad[1]
        dx, dbias = bias_gelu_backward(dy, x, bias, ctx.tanh, with_bias)
        return dx, dbias.to(bias.dtype) if with_bias else None, None, None


@operator("bias_gelu_forward(Tensor x, Tensor? bias, bool tanh) -> Tensor", lambda x, bias, tanh: x.new_empty(x.shape))
def bias_gelu_forward(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    y = x.new_empty(x.shape)
    flat = rows_of(x)
    rows, columns = flat.shape
    meta = options("bias_gelu_forward", columns, x.device)
    grid = (triton.cdiv(rows, meta["BLOCK_ROWS"]), triton.cdiv(columns, meta["BLOCK"]))
    bias = None if bias is None else bias.contiguous()
    launch(_bias_gelu_forward_kernel, grid, flat, bias, y, flat.stride(0), rows, columns, ACTIVATION=1 + tanh, **meta)
    return y


def _empty_backward(dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, with_bias: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[-1] if with_bias else 0, dtype=torch.float32)


@operator(
    "bias_gelu_backward(Tensor dy, Tensor x, Tensor? bias, bool tanh, bool with_bias) -> (Tensor dx, Tensor dbias)",
    _empty_backward,
)
def bias_gelu_backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, with_bias: bool
) -> tuple[Tensor, Tensor]:
    dx, dbias = _empty_backward(dy, x, bias, tanh, with_bias)
    if x.numel() == 0:
        return dx, dbias.zero_()
    flat, dy = rows_of(x), rows_of(dy)
    rows, columns = flat.shape
    meta = options("bias_gelu_backward", columns, x.device)
    programs = min(meta["PROGRAMS"], triton.cdiv(rows, meta["BLOCK_ROWS"]))
    parts = flat.new_empty(programs, columns, dtype=torch.float32) if with_bias else None
    grid = (programs, triton.cdiv(columns, meta["BLOCK"]))
    pointers = (dy, flat, None if bias is None else bias.contiguous(), dx, parts, dy.stride(0), flat.stride(0))
    launch(_bias_gelu_backward_kernel, grid, *pointers, rows, columns, ACTIVATION=1 + tanh, **meta)
    return dx, dbias if parts is None else parts.sum(0)


@jit(do_not_specialize=["rows"])
def _bias_gelu_forward_kernel(
    x_ptr,
    bias_ptr,
    y_ptr,
    x_stride,
    rows,
    columns,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: a tile of BLOCK_ROWS x BLOCK."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < columns)
    x = tl.load(x_ptr + row * x_stride + column, mask, 0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + column, column < columns, 0.0).to(tl.float32)
    y = activate_block(x, ACTIVATION)
    tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), mask)


@jit(do_not_specialize=["rows"])
def _bias_gelu_backward_kernel(
    dy_ptr,
    x_ptr,
    bias_ptr,
    dx_ptr,
    parts_ptr,
    dy_stride,
    x_stride,
    rows,
    columns,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """One program: BLOCK columns of every PROGRAMS-th group of BLOCK_ROWS rows, whose part of dbias it sums."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    dbias = tl.zeros((BLOCK_ROWS, BLOCK), tl.float32)
    for first in range(program * BLOCK_ROWS, rows, PROGRAMS * BLOCK_ROWS):
        row = (first + tl.arange(0, BLOCK_ROWS)[:, None]).to(tl.int64)
        mask = (row < rows) & (column < columns)
        x = tl.load(x_ptr + row * x_stride + column, mask, 0.0).to(tl.float32)
        if bias_ptr is not None:
            x += tl.load(bias_ptr + column, column < columns, 0.0).to(tl.float32)
        dx = tl.load(dy_ptr + row * dy_stride + column, mask, 0.0).to(tl.float32) * activate_slope(x, ACTIVATION)
        dbias += dx
        tl.store(dx_ptr + row * columns + column, dx.to(dx_ptr.dtype.element_ty), mask)
    if parts_ptr is not None:
        dbias = tl.sum(dbias, 0, keep_dims=True)
        tl.store(parts_ptr + program * columns + column, dbias, column < columns)
