"""FlashAttention-2 (arXiv 2307.08691) in Triton: forward, and what forward and backward share.

Scores are kept in units of log 2. Tiles that no pair of query and key is seen in are not visited, and those where every
pair is, are not masked.
"""

from tpformer_kernels.jit import jit, tl


@jit
def tile_place(tiles_ptr, queries, keys, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """This program's tile: its first number within its sequence, that sequence's first token, lengths and number.

    Packed sequences have a map (programs, 4) of (sequence, first number of the tile, first token, length).
    """
    tile = tl.program_id(0)
    if LAST_FIRST:  # those of a causal mask that have most to do
        tile = tl.num_programs(0) - 1 - tile
    start = tile * BLOCK
    token = tile * 0
    sequence = tile * 0
    if tiles_ptr is not None:
        sequence = tl.load(tiles_ptr + 4 * tile)
        start = tl.load(tiles_ptr + 4 * tile + 1)
        token = tl.load(tiles_ptr + 4 * tile + 2)
        queries = tl.load(tiles_ptr + 4 * tile + 3)
        keys = queries
    return start, token.to(tl.int64), queries, keys, sequence


@jit
def band(first, last, length, back, ahead, BACK: tl.constexpr, AHEAD: tl.constexpr, BLOCK: tl.constexpr):
    """Of `length` numbers those from first - back (if BACK) to last + ahead (if AHEAD), in blocks.

    Returns low, full, part, high: blocks from full to part are near every number from first to last, others near some.
    """
    low, full, high = 0, 0, length
    part = length // BLOCK * BLOCK
    if BACK:
        low = tl.maximum(first - back, 0) // BLOCK * BLOCK
        full = (tl.maximum(last - back, 0) + BLOCK - 1) // BLOCK * BLOCK
    if AHEAD:
        high = tl.minimum(high, last + ahead + 1)
        part = tl.minimum(part, (first + ahead + 1) // BLOCK * BLOCK)
    return low, full, part, high


@jit
def load_rows(ptr, stride, index, length, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head, (len(index), BLOCK_D); zeros beyond its length and its width."""
    d = tl.arange(0, BLOCK_D)
    inside = (index < length)[:, None] & (d < HEAD_DIM)[None, :]
    return tl.load(ptr + index.to(tl.int64)[:, None] * stride + d[None, :], inside, 0.0)


@jit
def store_rows(ptr, stride, index, length, x, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The counterpart of load_rows."""
    d = tl.arange(0, BLOCK_D)
    inside = (index < length)[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(ptr + index.to(tl.int64)[:, None] * stride + d[None, :], x.to(ptr.dtype.element_ty), inside)


@jit
def load_lse(lse_ptr, query, queries):
    """In units of log 2, and infinite where nothing is seen, so that exp2(x - lse) is 0 there."""
    lse = tl.load(lse_ptr + query, query < queries, -float("inf"))
    return tl.where(lse == -float("inf"), float("inf"), lse * 1.4426950408889634)


@jit
def seen_pairs(position, column, keys, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether queries, at their positions among the keys, see columns; one of the two stands upright."""
    distance = position - column
    seen = distance > position - keys  # which is column < keys, of both shapes at once
    if CAUSAL:
        seen = seen & (distance >= 0)
    if WINDOW:
        seen = seen & (distance < window)
    if WINDOW and not CAUSAL:
        seen = seen & (distance > -window)
    return seen


@jit
def kept_pairs(
    seed_low, seed_high, threshold, sample, head, query, start, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """What dropout keeps for queries (BLOCK_M,) and BLOCK_N keys from start: (BLOCK_M, BLOCK_N)."""
    seed = (seed_high.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | seed_low.to(tl.uint32, bitcast=True)
    zero = tl.zeros((BLOCK_M, BLOCK_N // 4), tl.int32)
    four = zero + (start // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    w0, w1, w2, w3 = tl.philox(seed, four, zero + query[:, None], zero + sample, zero + head)
    # side by side: word c % 4 of counter c // 4 is column c's
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_M, BLOCK_N))
    return words.to(tl.uint32, bitcast=True) >= threshold.to(tl.uint32, bitcast=True)


@jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@jit(do_not_specialize=["queries", "keys", "window", "seed_low", "seed_high", "threshold", "sample", "head"])
def attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
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
    o_stride_b,
    o_stride_h,
    o_stride_s,
    mask_stride,
    queries,
    keys,
    group,
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
    """One program: BLOCK_M queries of one head, all the keys that they see. Writes o and the log of the sums (fp32)."""
    h, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    lse_ptr += (b * tl.num_programs(1) + h) * queries
    start, token, queries, keys, sequence = tile_place(tiles_ptr, queries, keys, BLOCK_M, CAUSAL)
    sample += sequence + b.to(tl.int32)
    head += h.to(tl.int32)
    query = start + tl.arange(0, BLOCK_M)
    q_ptr += b * q_stride_b + h * q_stride_h + token * q_stride_s
    k_ptr += b * k_stride_b + h // group * k_stride_h + token * k_stride_s
    v_ptr += b * v_stride_b + h // group * v_stride_h + token * v_stride_s
    if key_mask_ptr is not None:
        key_mask_ptr += b * mask_stride
    q = load_rows(q_ptr, q_stride_s, query, queries, HEAD_DIM, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), -3.4028234663852886e38, tl.float32)  # finite, so that -inf - top is never NaN
    first = start + (keys - queries)
    ahead = 0 if CAUSAL else window - 1
    low, full, part, high = band(first, first + BLOCK_M - 1, keys, window - 1, ahead, WINDOW, CAUSAL or WINDOW, BLOCK_N)
    for begin in range(low, high, BLOCK_N):
        column = begin + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, k_stride_s, column, keys, HEAD_DIM, BLOCK_D)
        x = tl.dot(q, tl.trans(k), input_precision="ieee")
        if SOFTCAP:
            x = tanh(x * inner)
        if key_mask_ptr is not None:
            allowed = tl.load(key_mask_ptr + column, column < keys, 0)
            x = tl.where(allowed[None, :] != 0, x, -float("inf"))
        if (begin < full) | (begin >= part):
            position = (query + (keys - queries))[:, None]
            x = tl.where(seen_pairs(position, column[None, :], keys, window, CAUSAL, WINDOW), x, -float("inf"))
        higher = tl.maximum(top, tl.max(x, 1) * unit)
        p = tl.exp2(x * unit - higher[:, None])
        shrink = tl.exp2(top - higher)
        top = higher
        total = total * shrink + tl.sum(p, 1)
        if DROPOUT:
            kept = kept_pairs(seed_low, seed_high, threshold, sample, head, query, begin, BLOCK_M, BLOCK_N)
            p = tl.where(kept, p, 0.0)
        v = load_rows(v_ptr, v_stride_s, column, keys, HEAD_DIM, BLOCK_D)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    blind = total == 0.0  # saw no key
    total = tl.where(blind, 1.0, total)
    o = acc * (keep_scale / total)[:, None]
    o_ptr += b * o_stride_b + h * o_stride_h + token * o_stride_s
    store_rows(o_ptr, o_stride_s, query, queries, o, HEAD_DIM, BLOCK_D)
    lse = tl.where(blind, -float("inf"), (top + tl.log2(total)) * 0.6931471805599453)
    tl.store(lse_ptr + token + query, lse, query < queries)
