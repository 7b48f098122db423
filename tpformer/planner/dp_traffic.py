"""What replicas send: fp32 gradient buckets, or FSDP2's gathers and reduce-scatters, with their padding.

Sources: arXiv 2006.15704 (buckets); ZeRO (arXiv 1910.02054); PyTorch FSDP (2304.11277).
"""

from collections import Counter
from functools import lru_cache
from itertools import accumulate, chain
from math import prod

from tpformer.parallel.bubble import schedule_order
from tpformer.parallel_config import ZERO_BUBBLE, ParallelConfig, Schedule
from tpformer.planner.candidate import Candidate
from tpformer.planner.message import DTYPES, WIDTHS, Factors, Traffic
from tpformer.planner.shapes import Shapes, block_shapes, count, end_shapes
from tpformer.planner.share import Share

BUCKET_BYTES = 25 << 20
"""At which a bucket of gradients is full: that of `parallel.data.GradientBuckets`."""

STAGES_GATHERED = 3
"""Of a rank, at a time: torch's pipelines drop the others (`max_active_stages` of their schedules)."""


def dp_traffic(candidate: Candidate, share: Share, pp_rank: int) -> list[Traffic]:
    """Of one rank."""
    if candidate.dp == 1:
        return []
    return _bucketed(candidate, share) if candidate.shards == 1 else _sharded(candidate, share, pp_rank)


def _bucketed(candidate: Candidate, share: Share) -> list[Traffic]:
    def row(size: int, backward: bool, hidden: bool, number: int) -> Traffic:
        phase = "backward" if backward else "forward"
        factors = ("numbers", size), ("bytes", 4)
        return Traffic("all_reduce", "dp", "float32", phase, "gradient bucket", hidden, factors, (("buckets", number),))

    before, after = end_shapes(candidate.model, candidate.parallel.tp, share.first, share.last)
    sizes = tuple(
        tuple(map(prod, shapes.values()))
        for shapes in (before, block_shapes(candidate.model, candidate.parallel.tp), after)
    )
    return [row(*kind) for kind in _kinds(sizes, share.blocks, _by_hooks(candidate, share), BUCKET_BYTES)]


def _by_hooks(candidate: Candidate, share: Share) -> int | None:
    """How many numbers, from the last parameter on, are known to be complete while backward still runs; None: all.

    None of a stage whose last backward is in two parts: its gradients are sent when the step is through. In torch's
    DualPipeV only the last stage ends with a whole one.
    """
    p = candidate.parallel
    if p.pp == 1 or p.pp_schedule not in ZERO_BUBBLE:
        return None
    if p.pp_schedule != "dualpipev" or not share.last:
        return 0
    _, after = end_shapes(candidate.model, candidate.parallel.tp, False, True)
    return count(after) + share.stages[-1][0] * count(block_shapes(candidate.model, candidate.parallel.tp))


@lru_cache(maxsize=4096)
def _kinds(
    sizes: tuple[tuple[int, ...], ...], blocks: int, known: int | None, bucket_bytes: int
) -> tuple[tuple[int, bool, bool, int], ...]:
    """Numbers of a bucket, whether backward sends it, whether beside computation, and how many such there are."""
    buckets = bucket_sizes(sizes, blocks, bucket_bytes)
    in_backward = [known is None or end <= known for end in accumulate(buckets)]
    # the last one is complete when backward is over
    kinds = Counter(zip(buckets, in_backward, [*in_backward[:-1], False], strict=True))
    return tuple((*kind, number) for kind, number in kinds.items())


def bucket_sizes(sizes: tuple[tuple[int, ...], ...], blocks: int, bucket_bytes: int) -> list[int]:
    """Numbers in each bucket, as `parallel.data` fills them: from the last parameter to the first, each until full.

    sizes: of the parameters before the blocks, of a block's, and of those after them.
    """
    before, block, after = (tuple(reversed(part)) for part in sizes)
    buckets: list[int] = []
    for size in chain(after, *[block] * blocks, before):
        if not buckets or 4 * buckets[-1] >= bucket_bytes:
            buckets.append(0)
        buckets[-1] += size
    return buckets


def _sharded(candidate: Candidate, share: Share, pp_rank: int) -> list[Traffic]:
    """A group for each block, and one for each stage that has an end of the model."""
    shards = candidate.shards
    times = _gathers(candidate, pp_rank)
    again = sum(number * blocks for number, (blocks, _, _) in zip(times, share.stages, strict=True))
    found = _unit(
        candidate,
        "a block's",
        padded(block_shapes(candidate.model, candidate.parallel.tp), shards),
        share.blocks,
        again,
        block=True,
    )
    for number, (_, first, last) in zip(times, share.stages, strict=True):
        before, after = end_shapes(candidate.model, candidate.parallel.tp, first, last)
        both = padded(before, shards) + padded(after, shards)
        if both:
            found += _unit(candidate, f"the {_name(first, last)}'s", both, 1, number)
    return found


def _unit(
    candidate: Candidate, whose: str, numbers: int, groups: int, gathered: int, *, block: bool = False
) -> list[Traffic]:
    """What `groups` of FSDP2's send, each of so many numbers with padding, which all together are gathered so often.

    A block's are dropped after forward, and gathered and reduced beside other blocks' work; the ends' are not.
    """
    p, shards = candidate.parallel, candidate.shards
    split = 1 < shards < candidate.dp
    axis, dtype = "dp_shard" if split else "dp", DTYPES[p.precision]
    calls: Factors = (("groups", gathered),)
    if not kept(p):
        calls = ("micro-batches", candidate.micro_batches), *calls
    # pipelines reduce when their schedule is through: nothing is left to run beside it
    phase, hidden = ("forward", False) if p.pp > 1 else ("backward", block)
    narrow, wide = ((("numbers", numbers), ("bytes", width)) for width in (WIDTHS[dtype], 4))
    weights, gradients = f"{whose} parameters", f"{whose} gradients"
    found = [Traffic("all_gather", axis, dtype, "forward", weights, block, narrow, calls)]
    if block and not kept(p):
        found.append(Traffic("all_gather", axis, dtype, "backward", weights, block, narrow, calls))
    once: Factors = (("groups", groups),)
    found.append(Traffic("reduce_scatter", axis, "float32", phase, gradients, hidden, wide, once))
    if split:
        mine = (("numbers", numbers // shards), ("bytes", 4))
        found.append(Traffic("all_reduce", "dp_replicate", "float32", phase, gradients, hidden, mine, once))
    return found


def kept(p: ParallelConfig) -> bool:
    """Whether what FSDP2 gathered outlives a micro-batch: in zero2, and in a pipeline with its many."""
    return p.dp_mode == "zero2" or p.pp > 1


def _gathers(candidate: Candidate, pp_rank: int) -> tuple[int, ...]:
    """How often each stage of a rank is gathered in a step, or in a micro-batch if it is not kept."""
    p = candidate.parallel
    stages = p.num_stages // p.pp
    if stages <= STAGES_GATHERED:
        return (1,) * stages
    return _rotated(p.pp_schedule, p.pp, candidate.micro_batches, stages)[pp_rank]


@lru_cache(maxsize=256)
def _rotated(schedule: Schedule, pp: int, micro_batches: int, stages: int) -> tuple[tuple[int, ...], ...]:
    """Of a rank with more stages than torch keeps gathered: it has the next ones to be computed, and drops others."""
    found = []
    for actions in schedule_order(schedule, pp, micro_batches, stages):
        upcoming = [action.stage for action in actions]
        gathered: set[int] = set()
        times = Counter[int]()
        for place in range(len(upcoming)):
            following = _next_stages(upcoming, place)
            times.update(following - gathered)
            gathered = following
        found.append(tuple(times[stage] for stage in sorted(times)))
    return tuple(found)


def _next_stages(upcoming: list[int], place: int) -> set[int]:
    """Those that are computed first from this place on."""
    found: set[int] = set()
    for number in range(place, len(upcoming)):
        found.add(upcoming[number])
        if len(found) == STAGES_GATHERED:
            break
    return found


def padded(shapes: Shapes, shards: int) -> int:
    """Numbers of these parameters with every rank's rows padded to as many as the first rank has."""
    return sum(shards * -(-shape[0] // shards) * prod(shape[1:]) for shape in shapes.values())


def _name(first: bool, last: bool) -> str:
    return "two ends" if first and last else "first stage" if first else "last stage"
