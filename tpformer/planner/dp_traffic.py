"""What replicas send: fp32 gradient buckets, or FSDP2's gathers and reduce-scatters, with their padding.

Sources: arXiv 2006.15704 (buckets); ZeRO (arXiv 1910.02054); PyTorch FSDP (2304.11277).
"""

from collections import Counter
from functools import lru_cache
from itertools import accumulate, chain
from math import prod

from tpformer.parallel_config import ZERO_BUBBLE, ParallelConfig
from tpformer.planner.candidate import Candidate
from tpformer.planner.message import DTYPES, WIDTHS, Factors, Traffic
from tpformer.planner.shapes import Shapes, block_shapes, count, end_shapes
from tpformer.planner.share import Share

BUCKET_BYTES = 25 << 20
"""At which a bucket of gradients is full: that of `parallel.data.GradientBuckets`."""


def dp_traffic(candidate: Candidate, share: Share) -> list[Traffic]:
    """Of one rank."""
    if candidate.dp == 1:
        return []
    return _bucketed(candidate, share) if candidate.shards == 1 else _sharded(candidate, share)


def _bucketed(candidate: Candidate, share: Share) -> list[Traffic]:
    sizes = bucket_sizes(candidate, share)
    known = _by_hooks(candidate, share, sum(sizes))
    in_backward = [end <= known for end in accumulate(sizes)]
    # the last one is complete when backward is over
    groups = Counter(zip(sizes, in_backward, [*in_backward[:-1], False], strict=True))

    def row(size: int, backward: bool, hidden: bool, number: int) -> Traffic:
        phase = "backward" if backward else "forward"
        factors = ("numbers", size), ("bytes", 4)
        return Traffic("all_reduce", "dp", "float32", phase, "gradient bucket", hidden, factors, (("buckets", number),))

    return [row(*kind, number) for kind, number in groups.items()]


def _by_hooks(candidate: Candidate, share: Share, total: int) -> int:
    """How many numbers, from the last parameter on, are known to be complete while backward still runs.

    None of a stage whose last backward is in two parts: its gradients are sent when the step is through. In torch's
    DualPipeV only the last stage ends with a whole one.
    """
    p = candidate.parallel
    if p.pp == 1 or p.pp_schedule not in ZERO_BUBBLE:
        return total
    if p.pp_schedule != "dualpipev" or not share.last:
        return 0
    _, after = end_shapes(candidate, False, True)
    return count(after) + share.last_blocks * count(block_shapes(candidate))


def bucket_sizes(candidate: Candidate, share: Share) -> tuple[int, ...]:
    """Numbers in each bucket of gradients, in the order in which backward fills them."""
    before, after = end_shapes(candidate, share.first, share.last)
    sizes = tuple(tuple(map(prod, shapes.values())) for shapes in (before, block_shapes(candidate), after))
    return _buckets(*sizes, share.blocks, BUCKET_BYTES)


@lru_cache(maxsize=4096)
def _buckets(
    before: tuple[int, ...], block: tuple[int, ...], after: tuple[int, ...], blocks: int, bucket_bytes: int
) -> tuple[int, ...]:
    """As `parallel.data` groups them: from the last parameter to the first, each bucket until it is full."""
    buckets: list[int] = []
    for size in chain(reversed(after), *[tuple(reversed(block))] * blocks, reversed(before)):
        if not buckets or 4 * buckets[-1] >= bucket_bytes:
            buckets.append(0)
        buckets[-1] += size
    return tuple(buckets)


def _sharded(candidate: Candidate, share: Share) -> list[Traffic]:
    """A group for each block, and one for each stage that has an end of the model."""
    shards = candidate.shards
    block = padded(block_shapes(candidate), shards)
    found = _unit(candidate, ("a block's", block), (("blocks", share.blocks),), True)
    for first, last in share.ends:
        before, after = end_shapes(candidate, first, last)
        both = padded(before, shards) + padded(after, shards)
        found += _unit(candidate, (f"the {_name(first, last)}'s", both), (("ends", 1),), False)
    return [traffic for traffic in found if traffic.calls]


def _unit(candidate: Candidate, unit: tuple[str, int], each: Factors, block: bool) -> list[Traffic]:
    """What one of FSDP2's groups sends; `unit`: whose, and its padded numbers."""
    p, shards, (whose, numbers) = candidate.parallel, candidate.shards, unit
    split = 1 < shards < candidate.dp
    axis, dtype = "dp_shard" if split else "dp", DTYPES[p.precision]
    count: Factors = (("micro-batches", candidate.micro_batches),)
    once = kept(p)  # gathered for the step
    # pipelines reduce when their schedule is through: nothing is left to run beside it
    phase, hidden = ("forward", False) if p.pp > 1 else ("backward", block)
    wide, narrow = (("numbers", numbers), ("bytes", 4)), (("numbers", numbers), ("bytes", WIDTHS[dtype]))
    gradients = f"{whose} gradients"

    def gather(phase: str, calls: Factors) -> Traffic:
        return Traffic("all_gather", axis, dtype, phase, f"{whose} parameters", block, narrow, calls)

    found = [gather("forward", each if once else (*count, *each))]
    if block and not once:
        found.append(gather("backward", (*count, *each)))
    found.append(Traffic("reduce_scatter", axis, "float32", phase, gradients, hidden, wide, each))
    if split:
        mine = (("numbers", numbers // shards), ("bytes", 4))
        found.append(Traffic("all_reduce", "dp_replicate", "float32", phase, gradients, hidden, mine, each))
    return found


def kept(p: ParallelConfig) -> bool:
    """Whether what FSDP2 gathered stays for the whole step: zero2, and a pipeline with its many micro-batches."""
    return p.dp_mode == "zero2" or p.pp > 1


def padded(shapes: Shapes, shards: int) -> int:
    """Numbers of these parameters with every rank's rows padded to as many as the first rank has."""
    return sum(shards * -(-shape[0] // shards) * prod(shape[1:]) for shape in shapes.values())


def _name(first: bool, last: bool) -> str:
    return "two ends" if first and last else "first stage" if first else "last stage"
