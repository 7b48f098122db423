"""The gradient of queries in Triton, and what both backward kernels subtract from the probabilities' gradients.

ds = p (g vᵀ - delta), dq = scale ds k, where delta = rowsum(g o) less the gradient of lse.
"""

from tpformer_kernels.attention_kernels import (
    band,
    kept_pairs,
    load_lse,
    load_rows,
    seen_pairs,
    store_rows,
    tanh,
    tile_place,
)
from tpformer_kernels.jit import jit, tl


@jit(do_not_specialize=["queries"])
def attention_delta_kernel(
    do_ptr,
    o_ptr,
    lse_ptr,
    dlse_ptr,
    delta_ptr,
    do_stride_b,
    do_stride_h,
    do_stride_s,
    o_stride_b,
    o_stride_h,
    o_stride_s,
    queries,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One program: BLOCK_ROWS queries of one head; 0 for those that see nothing, whatever lse's gradient is."""
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    query = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = query < queries
    do_ptr += b * do_stride_b + h * do_stride_h
    o_ptr += b * o_stride_b + h * o_stride_h
    do = load_rows(do_ptr, do_stride_s, query, queries, HEAD_DIM, BLOCK_D).to(tl.float32)
    o = load_rows(o_ptr, o_stride_s, query, queries, HEAD_DIM, BLOCK_D).to(tl.float32)
    delta = tl.sum(do * o, 1)
    place = (b * tl.num_programs(1) + h) * queries + query
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + place, inside, 0.0)
    lse = tl.load(lse_ptr + place, inside, 0.0)
    tl.store(delta_ptr + place, tl.where(lse == -float("inf"), 0.0, delta), inside)


@jit(do_not_specialize=["queries", "keys", "window", "seed_low", "seed_high", "threshold", "sample", "head"])
def attention_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    key_mask_ptr,
    tiles_ptr,
    q_stride_b,
    q_stride_h,
    q_stride_s,
    k_stride_b,
    k_stride_h,
    k_stride_s,
    v_stride_b,
    v_stride_h,
    v_stride_s,
    do_stride_b,
    do_stride_h,
    do_stride_s,
    dq_stride_b,
    dq_stride_h,
    dq_stride_s,
    mask_stride,
    queries,
    keys,
    group,
    scale,
    inner,
    unit,
    window,
    seed_low,
    seed_high,
    threshold,
    sample,
    head,
    keep_scale,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program: BLOCK_M queries of one head, all the keys that they see."""
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = (b * tl.num_programs(1) + h) * queries
    start, token, queries, keys, sequence = tile_place(tiles_ptr, queries, keys, BLOCK_M, CAUSAL)
    sample += sequence + b.to(tl.int32)
    head += h.to(tl.int32)
    query = start + tl.arange(0, BLOCK_M)
    q_ptr += b * q_stride_b + h * q_stride_h + token * q_stride_s
    k_ptr += b * k_stride_b + h // group * k_stride_h + token * k_stride_s
    v_ptr += b * v_stride_b + h // group * v_stride_h + token * v_stride_s
    do_ptr += b * do_stride_b + h * do_stride_h + token * do_stride_s
    if key_mask_ptr is not None:
        key_mask_ptr += b * mask_stride
    q = load_rows(q_ptr, q_stride_s, query, queries, HEAD_DIM, BLOCK_D)
    do = load_rows(do_ptr, do_stride_s, query, queries, HEAD_DIM, BLOCK_D)
    lse = load_lse(lse_ptr + row + token, query, queries)
    delta = tl.load(delta_ptr + row + token + query, query < queries, 0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    first = start + (keys - queries)
    ahead = 0 if CAUSAL else window - 1
    low, full, part, high = band(first, first + BLOCK_M - 1, keys, window - 1, ahead, WINDOW, CAUSAL or WINDOW, BLOCK_N)
    for begin in range(low, high, BLOCK_N):
        column = begin + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, k_stride_s, column, keys, HEAD_DIM, BLOCK_D)
        x = tl.dot(q, tl.trans(k), input_precision="ieee")
        if SOFTCAP:
            x = tanh(x * inner)
            slope = 1 - x * x
        if key_mask_ptr is not None:
            allowed = tl.load(key_mask_ptr + column, column < keys, 0)
            x = tl.where(allowed[None, :] != 0, x, -float("inf"))
        if (begin < full) | (begin >= part):
            position = (query + (keys - queries))[:, None]
            x = tl.where(seen_pairs(position, column[None, :], keys, window, CAUSAL, WINDOW), x, -float("inf"))
        p = tl.exp2(x * unit - lse[:, None])
        v = load_rows(v_ptr, v_stride_s, column, keys, HEAD_DIM, BLOCK_D)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        if DROPOUT:
            kept = kept_pairs(seed_low, seed_high, threshold, sample, head, query, begin, BLOCK_M, BLOCK_N)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        if SOFTCAP:
            ds = ds * slope
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    dq_ptr += b * dq_stride_b + h * dq_stride_h + token * dq_stride_s
    store_rows(dq_ptr, dq_stride_s, query, queries, dq * scale, HEAD_DIM, BLOCK_D)
