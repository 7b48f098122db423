"""The gradients of keys and values in Triton: a kernel of its own, so that no sum is a race.

With p the probabilities and g the output's gradient: dv = pᵀ g, ds = p (g vᵀ - delta), dk = scale dsᵀ q.
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


@jit(do_not_specialize=["queries", "keys", "window", "seed_low", "seed_high", "threshold", "sample", "head"])
def attention_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
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
    dk_stride_b,
    dk_stride_h,
    dk_stride_s,
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
    """One program: BLOCK_N keys and values of one KV head, all the queries of its group that see them, head by head."""
    kv_head, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    total = queries
    start, token, queries, keys, sequence = tile_place(tiles_ptr, queries, keys, BLOCK_N, False)
    sample += sequence + b.to(tl.int32)
    column = start + tl.arange(0, BLOCK_N)
    k_ptr += b * k_stride_b + kv_head * k_stride_h + token * k_stride_s
    v_ptr += b * v_stride_b + kv_head * v_stride_h + token * v_stride_s
    q_ptr += b * q_stride_b + token * q_stride_s
    do_ptr += b * do_stride_b + token * do_stride_s
    if key_mask_ptr is not None:
        allowed = tl.load(key_mask_ptr + b * mask_stride + column, column < keys, 0)
    k = load_rows(k_ptr, k_stride_s, column, keys, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr, v_stride_s, column, keys, HEAD_DIM, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    first = start - (keys - queries)  # the query that stands at the first key
    back = 0 if CAUSAL else window - 1
    low, full, part, high = band(
        first, first + BLOCK_N - 1, queries, back, window - 1, CAUSAL or WINDOW, WINDOW, BLOCK_M
    )
    blocks = tl.maximum(high - low + BLOCK_M - 1, 0) // BLOCK_M
    for block in range(group * blocks):  # of one query head after the other
        member = block // tl.maximum(blocks, 1)
        begin = low + (block - member * blocks) * BLOCK_M
        h = kv_head * group + member
        query = begin + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr + h * q_stride_h, q_stride_s, query, queries, HEAD_DIM, BLOCK_D)
        x = tl.dot(k, tl.trans(q), input_precision="ieee")  # (keys, queries)
        if SOFTCAP:
            x = tanh(x * inner)
            slope = 1 - x * x
        if key_mask_ptr is not None:
            x = tl.where(allowed[:, None] != 0, x, -float("inf"))
        if (begin < full) | (begin >= part):
            position = (query + (keys - queries))[None, :]
            x = tl.where(seen_pairs(position, column[:, None], keys, window, CAUSAL, WINDOW), x, -float("inf"))
        row = (b * tl.num_programs(1) * group + h) * total + token
        p = tl.exp2(x * unit - load_lse(lse_ptr + row, query, queries)[None, :])
        do = load_rows(do_ptr + h * do_stride_h, do_stride_s, query, queries, HEAD_DIM, BLOCK_D)
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        weights = p
        if DROPOUT:
            number = head + h.to(tl.int32)
            kept = kept_pairs(seed_low, seed_high, threshold, sample, number, query, start, BLOCK_M, BLOCK_N)
            weights = tl.where(tl.trans(kept), p, 0.0)
            dp = tl.where(tl.trans(kept), dp * keep_scale, 0.0)
        dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (dp - tl.load(delta_ptr + row + query, query < queries, 0.0)[None, :])
        if SOFTCAP:
            ds = ds * slope
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    place = b * dk_stride_b + kv_head * dk_stride_h + token * dk_stride_s
    store_rows(dk_ptr + place, dk_stride_s, column, keys, dk * scale, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr + place, dk_stride_s, column, keys, dv * keep_scale, HEAD_DIM, BLOCK_D)
