"""The bubble of a pipeline schedule: what every rank would idle if nothing but the order of the work cost time.

Sources: arXiv 2104.04473, section 2.2 (GPipe and 1F1B idle (p-1)/(m+p-1) of the time); arXiv 2401.10241 (zero bubble,
ZBV); the orders of the schedules with several stages a rank are torch's own.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import NamedTuple

from tpformer.parallel.split import check_micro_batches
from tpformer.parallel.timeline import Kind, Span, idle_share
from tpformer.parallel_config import ParallelConfig, Schedule

Cost = Callable[[Kind, int], float]
"""Seconds, or any unit, of a kind of work on a stage."""
Order = list[list["Action"]]
"""What each rank does, one action after another."""

_KINDS: dict[str, Kind] = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
_TORCH_NAMES = {
    "interleaved_1f1b": "Interleaved1F1B",
    "interleaved_zero_bubble": "InterleavedZeroBubble",
    "zbv": "ZBVZeroBubble",
    "dualpipev": "DualPipeV",
}


class Action(NamedTuple):
    """One micro-batch's way through one stage, in one direction."""

    kind: Kind
    stage: int
    micro_batch: int


def theoretical_bubble(schedule: Schedule, pp: int, micro_batches: int, stages_per_rank: int = 0) -> float:
    """The mean idle share of the ranks where all stages cost the same and sending costs nothing; no processes.

    Raises ValueError as `schedule_order` does.
    """
    return idle_share(simulate(schedule_order(schedule, pp, micro_batches, stages_per_rank)))


def schedule_order(schedule: Schedule, pp: int, micro_batches: int, stages_per_rank: int = 0) -> Order:
    """What each of the pp ranks does in a step of that many micro-batches.

    Raises ValueError as ParallelConfig does, and where the schedule cannot run that many micro-batches.
    """
    config = ParallelConfig(pp=pp, pp_schedule=schedule, stages_per_rank=stages_per_rank)
    check_micro_batches(config if pp > 1 else ParallelConfig(), micro_batches)
    if pp == 1:
        return [_one_stage_order(0, micro_batches, 1)]
    if schedule == "gpipe":
        return [_one_stage_order(rank, micro_batches, micro_batches) for rank in range(pp)]
    if schedule == "1f1b":
        return [_one_stage_order(rank, micro_batches, pp - rank) for rank in range(pp)]
    return _torch_order(schedule, pp, micro_batches, config.num_stages)


def _one_stage_order(stage: int, micro_batches: int, ahead: int) -> list[Action]:
    """`ahead` forwards, then a backward and a forward by turns; torch's own list for 1F1B misnumbers the last rank."""
    actions = [Action("forward", stage, number) for number in range(ahead)]
    for number in range(micro_batches):
        actions.append(Action("backward", stage, number))
        if number + ahead < micro_batches:
            actions.append(Action("forward", stage, number + ahead))
    return actions


def _torch_order(schedule: Schedule, pp: int, micro_batches: int, num_stages: int) -> Order:
    # here, because it takes a second and most callers never need it
    from torch.distributed.pipelining.schedules import get_schedule_class

    # torch builds the order of every rank from these few numbers of any one rank's stages
    stages = [SimpleNamespace(group_rank=0, group_size=pp, num_stages=num_stages, submod=None)] * (num_stages // pp)
    made = get_schedule_class(_TORCH_NAMES[schedule])(stages, micro_batches)
    order: Order = []
    for rank in range(pp):
        # a forward and a backward that overlap are one entry with two parts
        parts = [part for action in made.pipeline_order[rank] if action for part in action.sub_actions or (action,)]
        order.append([Action(_KINDS[p.computation_type.value], p.stage_index, p.microbatch_index) for p in parts])
    return order


def alike(kind: Kind, stage: int) -> float:
    """The cost of textbooks: every stage alike, and a full backward twice a forward."""
    return 2.0 if kind == "backward" else 1.0


def simulate(order: Order, cost: Cost = alike) -> list[list[Span]]:
    """The spans of each rank that does its list in order, each action as soon as what it needs is there.

    Raises ValueError if the lists wait for each other, or for what nobody does.
    """
    last = max(action.stage for actions in order for action in actions)
    ready: dict[tuple[str, int, int], float] = {}
    spans: list[list[Span]] = [[] for _ in order]
    moved = True
    while moved:
        moved = False
        for actions, done in zip(order, spans, strict=True):
            while len(done) < len(actions) and all(need in ready for need in _needs(actions[len(done)], last)):
                action = actions[len(done)]
                start = max([done[-1].end if done else 0.0, *(ready[need] for need in _needs(action, last))])
                done.append(Span(*action, start, start + cost(action.kind, action.stage)))
                ready[_made(action)] = done[-1].end
                moved = True
    for rank, (actions, done) in enumerate(zip(order, spans, strict=True)):
        if len(done) < len(actions):
            action = actions[len(done)]
            raise ValueError(
                f"rank {rank} waits for ever before the {action.kind} of micro-batch {action.micro_batch} "
                f"on stage {action.stage}: the order of the schedule is wrong"
            )
    return spans


def disorder(ranks: Sequence[Sequence[Span]]) -> float:
    """The most seconds by which a span starts before what it needs has ended, or is missing (inf); 0 if none does.

    Of a right schedule it is how far the ranks' clocks disagree.
    """
    spans = [span for rank in ranks for span in rank if span.kind != "optimizer"]
    last = max((span.stage for span in spans), default=0)
    ready: defaultdict[tuple[str, int, int], float] = defaultdict(lambda: float("inf"))
    for span in spans:
        made = _made(Action(*span[:3]))
        ready[made] = max(span.end, ready.get(made, span.end))
    early = [ready[need] - span.start for span in spans for need in _needs(Action(*span[:3]), last)]
    return max([0.0, *early])


def _made(action: Action) -> tuple[str, int, int]:
    """What others may wait for: the activations, their gradient, or the weights' gradient."""
    made = {"input gradient": "gradient", "backward": "gradient"}.get(action.kind, action.kind)
    return made, action.stage, action.micro_batch


def _needs(action: Action, last_stage: int) -> list[tuple[str, int, int]]:
    """What must be there before an action starts."""
    kind, stage, number = action
    if kind == "forward":
        return [("forward", stage - 1, number)] if stage else []
    if kind == "weight gradient":
        return [("gradient", stage, number)]
    after = [("gradient", stage + 1, number)] if stage < last_stage else []
    return [("forward", stage, number), *after]
