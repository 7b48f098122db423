"""What tensor and sequence parallelism send: `collectives`' two doors, counted for a whole step.

Sources: arXiv 1909.08053, section 3; arXiv 2205.05198, section 4.2.
"""

from functools import lru_cache

from tpformer.layers import linear_cross_entropy
from tpformer.parallel_config import ParallelConfig
from tpformer.planner.candidate import Candidate, ModelConfig
from tpformer.planner.message import DTYPES, WIDTHS, Factors, Traffic
from tpformer.planner.shapes import Copied, block_copies, end_copies, end_shapes
from tpformer.planner.share import Share

STATISTICS = 3
"""fp32 numbers of a token that the loss's ranks exchange: maximum, sum of exponentials, the target's logit."""
WITH_COLUMN = ("attention", "attention.qkv", "mlp", "mlp.up", "mlp.gate_up")
"""Modules of a block in which a tensor-parallel region is entered."""
WITH_ROW = ("attention", "attention.out", "mlp", "mlp.down")
"""Modules of a block in which one is left."""


def tp_traffic(candidate: Candidate, share: Share, dp_rank: int) -> list[Traffic]:
    """Of one rank."""
    if candidate.parallel.tp == 1:
        return []
    return [*layers_traffic(candidate, share), *_partial_sum(candidate, share, dp_rank)]


def layers_traffic(candidate: Candidate, share: Share) -> list[Traffic]:
    """What the layers send as they run; what is sent once for all of them is not here.

    Where matmuls overlap with communication, a call stands for its chunks: they carry the same.
    """
    p = candidate.parallel
    if p.tp == 1:
        return []
    sizes = (candidate.micro_batch_size, candidate.seq_len, candidate.model.hidden_size)
    overlaps = p.sequence_parallel and (p.overlap == "chunked" or (not candidate.on_cpu and p.overlap != "off"))
    enters, leaves = replays(p, overlaps)
    counts = (candidate.micro_batches, share.blocks, share.first, share.last)
    again = (share.recomputed * enters, share.recomputed * leaves)
    doors = _gathered if p.sequence_parallel else _reduced
    found = [*doors(DTYPES[p.precision], sizes, counts, again, overlaps)]
    return found + _statistics(candidate) if share.last else found


def replays(p: ParallelConfig, overlaps: bool) -> tuple[int, int]:
    """How often a recomputed block enters and leaves tensor-parallel regions again, beyond what backward itself does.

    Recomputation stops at the last tensor that backward needs, which is before the block's last sum; unless that sum
    is part of a matmul, or the block is one compiled function.
    """
    if p.recompute == "full":
        return 2, 2 if overlaps or p.compile else 1
    if p.recompute == "selective":
        entered = sum(name in WITH_COLUMN for name in p.recompute_modules)
        return entered, overlaps * sum(name in WITH_ROW for name in p.recompute_modules)
    return 0, 0


@lru_cache(maxsize=4096)
def _reduced(
    dtype: str, sizes: tuple[int, ...], counts: tuple[int, ...], again: tuple[int, int], overlaps: bool
) -> tuple[Traffic, ...]:
    """Without sequence parallelism, in which nothing overlaps: every door is an all-reduce, or nothing."""
    (count, blocks, first, last), (_, leaves) = counts, again
    factors = _whole(dtype, sizes)

    def row(phase: str, what: str, hidden: bool, *calls: tuple[str, int]) -> Traffic:
        return Traffic("all_reduce", "tp", dtype, phase, what, hidden, factors, (("micro-batches", count), *calls))

    regions = ("blocks", blocks), ("regions", 2)
    found = (
        row("forward", "embedding of all ranks' vocabulary", False, ("embedding", first)),
        row("forward", "sum of a block's two regions", False, *regions),
        row("backward", "sum of regions, recomputed", False, ("recomputed", leaves)),
        row("backward", "gradient of two regions' input", True, *regions),
        row("backward", "gradient of the head's input", True, ("head", last)),
    )
    return tuple(traffic for traffic in found if traffic.calls)


@lru_cache(maxsize=4096)
def _gathered(
    dtype: str, sizes: tuple[int, ...], counts: tuple[int, ...], again: tuple[int, int], overlaps: bool
) -> tuple[Traffic, ...]:
    """Under sequence parallelism: a region's input is gathered, its output scattered, and the reverse in backward."""
    (count, blocks, first, last), (enters, leaves) = counts, again
    factors = _whole(dtype, sizes)

    def row(op: str, phase: str, what: str, hidden: bool, *calls: tuple[str, int]) -> Traffic:
        return Traffic(op, "tp", dtype, phase, what, hidden, factors, (("micro-batches", count), *calls))

    gather, scatter, regions = "all_gather", "reduce_scatter", (("blocks", blocks), ("regions", 2))
    found = (
        row(scatter, "forward", "embedding of all ranks' vocabulary", False, ("embedding", first)),
        row(gather, "forward", "input of a block's two regions", overlaps, *regions),
        row(scatter, "forward", "sum of a block's two regions", overlaps, *regions),
        row(gather, "forward", "input of the head", False, ("head", last)),
        row(gather, "backward", "input of regions, recomputed", overlaps, ("recomputed", enters)),
        row(scatter, "backward", "sum of regions, recomputed", overlaps, ("recomputed", leaves)),
        row(gather, "backward", "gradient of two regions' output", overlaps, *regions),
        row(gather, "backward", "input again, for weights' gradients", True, *regions),
        row(scatter, "backward", "gradient of two regions' input", True, *regions),
        row(scatter, "backward", "gradient of the head's input", True, ("head", last)),
        row(gather, "backward", "gradient of the embedding", False, ("embedding", first)),
    )
    return tuple(traffic for traffic in found if traffic.calls)


def _whole(dtype: str, sizes: tuple[int, ...]) -> Factors:
    """Of all of an activation."""
    b, s, d = sizes
    return ("b", b), ("s", s), ("d", d), ("bytes", WIDTHS[dtype])


def _statistics(candidate: Candidate) -> list[Traffic]:
    """Of the fused loss, a chunk of tokens after another: `linear_cross_entropy` computes the next one meanwhile."""
    p, (before, after) = candidate.parallel, end_shapes(candidate.model, candidate.parallel.tp, False, True)
    rows, width = before["embedding.weight"] if candidate.model.tie_embeddings else after["head.weight"]
    tokens = candidate.micro_batch_size * candidate.seq_len
    chunk = max(linear_cross_entropy.LEAST_CHUNK, rows * width * candidate.width)
    step = min(tokens, max(1, chunk // (rows * candidate.width)))
    chunks, last = -(-tokens // step), tokens % step or step

    def row(size: int, number: int, hidden: bool) -> Traffic:
        factors = ("tp", p.tp), ("tokens", size), ("statistics", STATISTICS), ("bytes", 4)
        calls = ("micro-batches", candidate.micro_batches), ("chunks", number)
        return Traffic("all_gather", "tp", "float32", "forward", "loss statistics", hidden, factors, calls)

    return [row(step, chunks - 1, True)] * (chunks > 1) + [row(last, 1, False)]


def _partial_sum(candidate: Candidate, share: Share, dp_rank: int) -> list[Traffic]:
    """The one all-reduce after backward, `placement.sum_partial`: nothing where this rank has no such rows."""
    p, shards = candidate.parallel, candidate.shards
    layout = (candidate.model, p.tp, p.sequence_parallel)
    block, ends = _partial_numbers(layout, share.first, share.last, (shards, dp_rank % shards))
    numbers = share.blocks * block + ends
    if not numbers:
        return []
    what = "partial gradients of copies"
    factors = ("numbers", numbers), ("bytes", 4)
    return [Traffic("all_reduce", "tp", "float32", "forward", what, False, factors, (("steps", 1),))]


@lru_cache(maxsize=4096)
def _partial_numbers(
    layout: tuple[ModelConfig, int, bool], first: bool, last: bool, shard: tuple[int, int]
) -> tuple[int, int]:
    """Of a block, and of the ends, those that replica `shard[1]` of `shard[0]` has."""
    block, ends = block_copies(*layout), end_copies(*layout, first, last)
    return sum(_present(c, *shard) for c in block), sum(_present(c, *shard) for c in ends)


def _present(copied: Copied, shards: int, shard: int) -> int:
    """Numbers that a replica puts into the sum: of its rows (torch.chunk's), those that are copies."""
    size = -(-copied.length // shards)
    start, stop = max(shard * size, copied.start), min((shard + 1) * size, copied.start + copied.rows)
    return max(0, stop - start) * copied.width * copied.different
