"""Triton kernels of RMSNorm and LayerNorm, with the residual add: forward, and backward with weight gradients.

Forward reads a row once and writes it once (with a residual: two and two). Backward is a fixed number of programs
that stride over the rows; each keeps its part of the weight's gradient in fp32, the parts are summed in a fixed order.
A row of up to WIDE_FORWARD or WIDE_BACKWARD numbers stays in registers; of a longer one the blocks are read again,
from the cache.
"""

from tpformer_kernels.jit import jit, tl

WIDE_FORWARD, WIDE_BACKWARD = 16384, 8192
"""Longer rows than this do not fit the registers of a program."""


@jit(do_not_specialize=["rows"])
def _norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    x_stride,
    residual_stride,
    rows,
    columns,
    eps,
    CENTER: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK_ROWS whole rows, in registers. Statistics in fp32, of the sum as it is stored."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (column < columns)
    x = tl.load(x_ptr + row * x_stride + column, mask, 0.0).to(tl.float32)
    if residual_ptr is not None:
        x += tl.load(residual_ptr + row * residual_stride + column, mask, 0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * columns + column, total, mask)
        x = total.to(tl.float32)
    if CENTER:
        mean = tl.sum(x, 1, keep_dims=True) / columns
        x = tl.where(mask, x - mean, 0.0)
        tl.store(mean_ptr + row, mean, row < rows)
    rstd = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / columns + eps)
    tl.store(rstd_ptr + row, rstd, row < rows)
    y = x * rstd * tl.load(weight_ptr + column, column < columns, 0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, column < columns, 0.0).to(tl.float32)
    tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), mask)


@jit
def _norm_forward_wide_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    total_ptr,
    mean_ptr,
    rstd_ptr,
    x_stride,
    residual_stride,
    columns,
    eps,
    CENTER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: one row of any length, block by block. The sum is made anew rather than read back (a race)."""
    row = tl.program_id(0).to(tl.int64)
    x_row, residual_row = x_ptr + row * x_stride, residual_ptr
    if residual_ptr is not None:
        residual_row += row * residual_stride
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = _summed_block(x_row, residual_row, total_ptr, column, columns)
        sums += x if CENTER else x * x
        if residual_ptr is not None:
            stored = x.to(total_ptr.dtype.element_ty)
            tl.store(total_ptr + row * columns + column, stored, column < columns)
    variance = tl.sum(sums, 0) / columns
    mean = 0.0
    if CENTER:
        mean = variance
        tl.store(mean_ptr + row, mean)
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, columns, BLOCK):
            column = start + tl.arange(0, BLOCK)
            x = _summed_block(x_row, residual_row, total_ptr, column, columns)
            x = tl.where(column < columns, x - mean, 0.0)
            sums += x * x
        variance = tl.sum(sums, 0) / columns
    rstd = tl.rsqrt(variance + eps)
    tl.store(rstd_ptr + row, rstd)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = _summed_block(x_row, residual_row, total_ptr, column, columns)
        y = (x - mean) * rstd * tl.load(weight_ptr + column, column < columns, 0.0).to(tl.float32)
        if bias_ptr is not None:
            y += tl.load(bias_ptr + column, column < columns, 0.0).to(tl.float32)
        tl.store(y_ptr + row * columns + column, y.to(y_ptr.dtype.element_ty), column < columns)


@jit
def _summed_block(x_row, residual_row, total_ptr, column, columns):
    """A block of x, or of x + residual rounded as it is stored; fp32, 0 beyond the row."""
    x = tl.load(x_row + column, column < columns, 0.0).to(tl.float32)
    if residual_row is not None:
        x += tl.load(residual_row + column, column < columns, 0.0).to(tl.float32)
        x = x.to(total_ptr.dtype.element_ty).to(tl.float32)
    return x


@jit(do_not_specialize=["rows"])
def _norm_backward_kernel(
    dy_ptr,
    dtotal_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    dy_stride,
    dtotal_stride,
    x_stride,
    rows,
    columns,
    BLOCK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """One of PROGRAMS: every PROGRAMS-th group of BLOCK_ROWS rows; its parts of dweight and dbias stay in registers."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    weight = tl.load(weight_ptr + column, column < columns, 0.0).to(tl.float32)
    dweight = tl.zeros((1, BLOCK), tl.float32)
    dbias = tl.zeros((1, BLOCK), tl.float32)
    for first in range(program * BLOCK_ROWS, rows, PROGRAMS * BLOCK_ROWS):
        row = (first + tl.arange(0, BLOCK_ROWS)[:, None]).to(tl.int64)
        mask = (row < rows) & (column < columns)
        dy = tl.load(dy_ptr + row * dy_stride + column, mask, 0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + column, mask, 0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, row < rows, 0.0)
        if mean_ptr is not None:
            x -= tl.load(mean_ptr + row, row < rows, 0.0)
        normed = tl.where(mask, x * rstd, 0.0)
        if dweight_ptr is not None:
            dweight += tl.sum(dy * normed, 0, keep_dims=True)
        if dbias_ptr is not None:
            dbias += tl.sum(dy, 0, keep_dims=True)
        dy *= weight
        dx = dy - normed * (tl.sum(dy * normed, 1, keep_dims=True) / columns)
        if mean_ptr is not None:
            dx -= tl.sum(dy, 1, keep_dims=True) / columns
        dx *= rstd
        if dtotal_ptr is not None:
            dx += tl.load(dtotal_ptr + row * dtotal_stride + column, mask, 0.0).to(tl.float32)
        tl.store(dx_ptr + row * columns + column, dx.to(dx_ptr.dtype.element_ty), mask)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + program * columns + column, dweight, column < columns)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + program * columns + column, dbias, column < columns)


@jit
def _norm_backward_wide_kernel(
    dy_ptr,
    dtotal_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dy_stride,
    dtotal_stride,
    x_stride,
    columns,
    BLOCK: tl.constexpr,
):
    """One program: dx of one row of any length, block by block."""
    row = tl.program_id(0).to(tl.int64)
    rstd = tl.load(rstd_ptr + row)
    mean = 0.0
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + row)
    products = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_stride + column, column < columns, 0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + column, column < columns, 0.0).to(tl.float32)
        dy *= tl.load(weight_ptr + column, column < columns, 0.0).to(tl.float32)
        products += dy * (x - mean) * rstd
        sums += dy
    product = tl.sum(products, 0) / columns
    offset = 0.0
    if mean_ptr is not None:
        offset = tl.sum(sums, 0) / columns
    for start in range(0, columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * x_stride + column, column < columns, 0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_stride + column, column < columns, 0.0).to(tl.float32)
        dy *= tl.load(weight_ptr + column, column < columns, 0.0).to(tl.float32)
        dx = (dy - offset - (x - mean) * rstd * product) * rstd
        if dtotal_ptr is not None:
            dx += tl.load(dtotal_ptr + row * dtotal_stride + column, column < columns, 0.0).to(tl.float32)
        tl.store(dx_ptr + row * columns + column, dx.to(dx_ptr.dtype.element_ty), column < columns)


@jit(do_not_specialize=["rows"])
def _norm_weight_wide_kernel(
    dy_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    dweight_ptr,
    dbias_ptr,
    dy_stride,
    x_stride,
    rows,
    columns,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """One program: BLOCK columns of every PROGRAMS-th row, for its parts of dweight and dbias."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    for number in range(program, rows, PROGRAMS):
        row = tl.full((), number, tl.int64)
        dy = tl.load(dy_ptr + row * dy_stride + column, column < columns, 0.0).to(tl.float32)
        x = tl.load(x_ptr + row * x_stride + column, column < columns, 0.0).to(tl.float32)
        if mean_ptr is not None:
            x -= tl.load(mean_ptr + row)
        dweight += dy * x * tl.load(rstd_ptr + row)
        dbias += dy
    if dweight_ptr is not None:
        tl.store(dweight_ptr + program * columns + column, dweight, column < columns)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + program * columns + column, dbias, column < columns)
