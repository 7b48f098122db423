"""How many micro-batches a rank of a pipeline has begun and not yet gone back through, at most.

Sources: arXiv 1811.06965 (GPipe: all), 2104.04473 (1F1B: what the stages behind it need to be busy; interleaved),
2401.10241 and 2412.19437 (V-shaped). Counted from the orders that torch runs, see `parallel.bubble.schedule_order`.
"""

from functools import lru_cache

from tpformer.parallel_config import V_SHAPED, ParallelConfig


def alive(config: ParallelConfig, pp_rank: int, micro_batches: int) -> tuple[int, ...]:
    """For each stage of a rank, first to last: forwards whose backward is still to come, when they are most in all."""
    return _alive(config.pp_schedule, config.pp, config.num_stages // config.pp, pp_rank, micro_batches)


@lru_cache(maxsize=16384)
def _alive(schedule: str, pp: int, stages: int, rank: int, count: int) -> tuple[int, ...]:
    if pp == 1:
        return (1,)
    if schedule == "gpipe":
        return (count,)
    if schedule == "1f1b":
        return (min(count, pp - rank),)
    if schedule in V_SHAPED:  # down and up again: what goes down early comes back late
        ahead = 1 if schedule == "dualpipev" else 0
        return min(count, 2 * pp - 1 - rank + ahead), min(count, rank + 1)
    # rounds of micro-batches through one stage after another; until the first backward only forwards
    a_round = count // max(1, count // pp)
    before = (stages - 1) * a_round + (pp - 1 - rank) * (2 if schedule == "interleaved_1f1b" else 1) + 1
    forwards = min(before, count * stages)
    whole, rest = divmod(forwards, a_round * stages)
    return tuple(whole * a_round + min(a_round, max(0, rest - stage * a_round)) for stage in range(stages))


def put_off(config: ParallelConfig, pp_rank: int) -> int:
    """Of so many micro-batches weights' gradients wait at that moment: the more, the further down the rank is."""
    return pp_rank if config.pp_schedule == "interleaved_zero_bubble" else 0


def at_the_end(config: ParallelConfig, pp_rank: int, micro_batches: int) -> tuple[tuple[int, ...], int]:
    """The same two when a step comes to its end: ZBV has put off most by then, and fewer are alive."""
    if config.pp_schedule != "zbv":
        return alive(config, pp_rank, micro_batches), put_off(config, pp_rank)
    return (min(micro_batches, config.pp - pp_rank), 0), 2 * pp_rank
