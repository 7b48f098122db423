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


@jit
def _dkdv_tiles(
    dk,
    dv,
    k,
    v,
    q_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    key_mask_ptr,
    q_stride,
    do_stride,
    low,
    high,
    start_key,
    queries,
    keys,
    inner,
    unit,
    window,
    seed_low,
    seed_high,
    threshold,
    sample,
    head,
    keep_scale,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds what queries from low to high of one head give to a tile of keys and values; tiles are (keys, queries)."""
    column = start_key + tl.arange(0, BLOCK_N)
    for start in range(low, high, BLOCK_M):
        query = start + tl.arange(0, BLOCK_M)
        q = load_rows(q_ptr, q_stride, query, queries, MASKED, HEAD_DIM, BLOCK_D)
        x = tl.dot(k, tl.trans(q), input_precision="ieee")
        if SOFTCAP:
            x = tanh(x * inner)
            slope = 1 - x * x
        if MASKED:
            position = (query + (keys - queries))[None, :]
            seen = seen_pairs(position, column[:, None], keys, window, CAUSAL, WINDOW)
            if key_mask_ptr is not None:
                seen = seen & (tl.load(key_mask_ptr + column, column < keys, 0) != 0)[:, None]
            x = tl.where(seen, x, -float("inf"))
        p = tl.exp2(x * unit - load_lse(lse_ptr, query, queries)[None, :])
        do = load_rows(do_ptr, do_stride, query, queries, MASKED, HEAD_DIM, BLOCK_D)
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        weights = p
        if DROPOUT:
            kept = kept_pairs(seed_low, seed_high, threshold, sample, head, query, start_key, BLOCK_M, BLOCK_N)
            weights = tl.where(tl.trans(kept), p, 0.0)
            dp = tl.where(tl.trans(kept), dp * keep_scale, 0.0)
        dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (dp - tl.load(delta_ptr + query, query < queries, 0.0)[None, :])
        if SOFTCAP:
            ds = ds * slope
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


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
    SPLIT: tl.constexpr,
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
    if key_mask_ptr is not None:
        key_mask_ptr += b * mask_stride
    k = load_rows(k_ptr, k_stride_s, column, keys, True, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr, v_stride_s, column, keys, True, HEAD_DIM, BLOCK_D)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    first = start - (keys - queries)  # the query that stands at the first key
    back = 0 if CAUSAL else window - 1
    low, full, part, high = band(
        first, first + BLOCK_N - 1, queries, back, window - 1, CAUSAL or WINDOW, WINDOW, BLOCK_M
    )
    for member in range(group):
        h = kv_head * group + member
        q_head = q_ptr + b * q_stride_b + h * q_stride_h + token * q_stride_s
        do_head = do_ptr + b * do_stride_b + h * do_stride_h + token * do_stride_s
        row = (b * tl.num_programs(1) * group + h) * total + token
        number = head + h.to(tl.int32)
        if SPLIT and (CAUSAL or WINDOW):
            dk, dv = _dkdv_tiles(
                dk, dv, k, v, q_head, do_head, lse_ptr + row, delta_ptr + row, key_mask_ptr, q_stride_s, do_stride_s,
                low, tl.minimum(full, high), start, queries, keys, inner, unit, window, seed_low, seed_high, threshold,
                sample, number, keep_scale,
                True, CAUSAL, WINDOW, SOFTCAP, DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        if SPLIT:
            dk, dv = _dkdv_tiles(
                dk, dv, k, v, q_head, do_head, lse_ptr + row, delta_ptr + row, key_mask_ptr, q_stride_s, do_stride_s,
                full, part, start, queries, keys, inner, unit, window, seed_low, seed_high, threshold,
                sample, number, keep_scale,
                False, CAUSAL, WINDOW, SOFTCAP, DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        rest = tl.maximum(full, part) if SPLIT else low
        dk, dv = _dkdv_tiles(
            dk, dv, k, v, q_head, do_head, lse_ptr + row, delta_ptr + row, key_mask_ptr, q_stride_s, do_stride_s,
            rest, high, start, queries, keys, inner, unit, window, seed_low, seed_high, threshold,
            sample, number, keep_scale,
            True, CAUSAL, WINDOW, SOFTCAP, DROPOUT, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    place = b * dk_stride_b + kv_head * dk_stride_h + token * dk_stride_s
    store_rows(dk_ptr + place, dk_stride_s, column, keys, dk * scale, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr + place, dk_stride_s, column, keys, dv * keep_scale, HEAD_DIM, BLOCK_D)
