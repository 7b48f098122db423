"""Triton kernels of matmul: y = a b and what follows it in one pass; a and b by pointers, or by descriptors (TMA).

Both are persistent: as many programs as the device has multiprocessors each take every so-many-th tile. Tiles are
numbered in groups of GROUP_M rows, so that programs that run together share columns of b in the L2 cache.
"""

from tpformer_kernels.gated import activate_block
from tpformer_kernels.jit import jit, tl


@jit
def matmul_kernel(
    y_ptr,
    pre_ptr,
    a_ptr,
    b_ptr,
    bias_ptr,
    residual_ptr,
    m,
    n,
    k,
    y_stride_m,
    y_stride_n,
    residual_stride_m,
    residual_stride_n,
    a_stride_m,
    a_stride_k,
    b_stride_k,
    b_stride_n,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SLICES: tl.constexpr,
):
    """One program: every num_programs-th tile of BLOCK_M x BLOCK_N; a (m, k) and b (k, n) of any strides.

    All sizes are specialised: the loads are wide only where Triton knows that 16 divides the length they end at.
    """
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP_M)
        row = (tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        column = (tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, k, BLOCK_K):
            inner = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
            inside_a = (row < m) & (inner < k)[None, :]
            inside_b = (inner < k)[:, None] & (column < n)
            a = tl.load(a_ptr + row * a_stride_m + inner[None, :] * a_stride_k, inside_a, 0.0)
            b = tl.load(b_ptr + inner[:, None] * b_stride_k + column * b_stride_n, inside_b, 0.0)
            sums = tl.dot(a, b, sums, input_precision=PRECISION)
        strides = (y_stride_m, y_stride_n, residual_stride_m, residual_stride_n)
        pointers = (y_ptr, pre_ptr, bias_ptr, residual_ptr)
        _finish(sums, pointers, strides, tile_m, tile_n, m, n, ACTIVATION, BLOCK_M, BLOCK_N, SLICES)


@jit(do_not_specialize=["m", "k"])
def matmul_descriptor_kernel(
    y_ptr,
    pre_ptr,
    a_descriptor,
    b_descriptor,
    bias_ptr,
    residual_ptr,
    m,
    n,
    k,
    y_stride_m,
    y_stride_n,
    residual_stride_m,
    residual_stride_n,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SLICES: tl.constexpr,
):
    """The same, of tiles that the copy engine brings: in the order of memory, zeros where the matrices end."""
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        tile_m, tile_n = _place(tile, tiles_m, tiles_n, GROUP_M)
        row, column = tile_m * BLOCK_M, tile_n * BLOCK_N
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, k, BLOCK_K):
            if A_TRANSPOSED:
                a = a_descriptor.load([start, row]).T
            else:
                a = a_descriptor.load([row, start])
            if B_TRANSPOSED:
                b = b_descriptor.load([column, start]).T
            else:
                b = b_descriptor.load([start, column])
            sums = tl.dot(a, b, sums, input_precision=PRECISION)
        strides = (y_stride_m, y_stride_n, residual_stride_m, residual_stride_n)
        pointers = (y_ptr, pre_ptr, bias_ptr, residual_ptr)
        _finish(sums, pointers, strides, tile_m, tile_n, m, n, ACTIVATION, BLOCK_M, BLOCK_N, SLICES)


@jit
def _place(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of a tile: down GROUP_M rows, then to the next column."""
    group = GROUP_M * tiles_n
    first = tile // group * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    return first + tile % group % rows, tile % group // rows


@jit
def _finish(
    sums,
    pointers,
    strides,
    tile_m,
    tile_n,
    m,
    n,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Write a tile, whole or as four slices of columns, one after the other, which need fewer registers."""
    row = (tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    start = tile_n.to(tl.int64) * BLOCK_N
    if SLICES == 1:
        _write(sums, pointers, strides, row, start, m, n, ACTIVATION, BLOCK_M, BLOCK_N)
    else:
        QUARTER: tl.constexpr = BLOCK_N // 4
        left, right = _halves(sums, BLOCK_M, BLOCK_N)
        first, second = _halves(left, BLOCK_M, BLOCK_N // 2)
        third, fourth = _halves(right, BLOCK_M, BLOCK_N // 2)
        _write(first, pointers, strides, row, start, m, n, ACTIVATION, BLOCK_M, QUARTER)
        _write(second, pointers, strides, row, start + QUARTER, m, n, ACTIVATION, BLOCK_M, QUARTER)
        _write(third, pointers, strides, row, start + 2 * QUARTER, m, n, ACTIVATION, BLOCK_M, QUARTER)
        _write(fourth, pointers, strides, row, start + 3 * QUARTER, m, n, ACTIVATION, BLOCK_M, QUARTER)


@jit
def _halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@jit
def _write(
    sums,
    pointers,
    strides,
    row,
    start,
    m,
    n,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Bias, residual and activation of WIDTH columns from `start`; the activation is that of the rounded sums."""
    y_ptr, pre_ptr, bias_ptr, residual_ptr = pointers
    y_stride_m, y_stride_n, residual_stride_m, residual_stride_n = strides
    column = (start + tl.arange(0, WIDTH))[None, :]
    inside = (row < m) & (column < n)
    if bias_ptr is not None:
        sums += tl.load(bias_ptr + column, column < n, 0.0).to(tl.float32)
    if residual_ptr is not None:
        offset = row * residual_stride_m + column * residual_stride_n
        sums += tl.load(residual_ptr + offset, inside, 0.0).to(tl.float32)
    if ACTIVATION == -1:
        tl.store(y_ptr + row * y_stride_m + column * y_stride_n, sums.to(y_ptr.dtype.element_ty), inside)
    else:
        pre = sums.to(pre_ptr.dtype.element_ty)
        tl.store(pre_ptr + row * n + column, pre, inside)
        x = pre.to(tl.float32)
        if ACTIVATION < 3:
            gate, up = tl.split(tl.reshape(x, (BLOCK_M, WIDTH // 2, 2)))
            pair = (start // 2 + tl.arange(0, WIDTH // 2))[None, :]
            y = activate_block(gate, ACTIVATION) * up
            tl.store(
                y_ptr + row * y_stride_m + pair * y_stride_n, y.to(y_ptr.dtype.element_ty), (row < m) & (pair < n // 2)
            )
        else:
            y = activate_block(x, ACTIVATION - 2)
            tl.store(y_ptr + row * y_stride_m + column * y_stride_n, y.to(y_ptr.dtype.element_ty), inside)
