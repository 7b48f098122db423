"""Which stage of a pipeline has which layers, and which process has which stages; plain numbers, no processes."""

from heapq import heapify, heapreplace
from itertools import accumulate
from typing import Any

from tpformer.models.decoder import Part
from tpformer.parallel_config import V_SHAPED, ParallelConfig


def stage_parts(model: Any, config: ParallelConfig, seq_len: int) -> list[Part]:
    """The part of each pipeline stage of a model config, first to last.

    Raises ValueError if there are fewer blocks than stages, or layers_per_stage does not add up.
    """
    layers, stages = model.num_layers, config.num_stages
    counts = list(config.layers_per_stage)
    if counts and sum(counts) != layers:
        raise ValueError(f"layers_per_stage {tuple(counts)} adds up to {sum(counts)}, but num_layers is {layers}")
    if layers < stages:
        raise ValueError(f"num_layers ({layers}) must be at least the number of pipeline stages ({stages})")
    counts = counts or balanced(layers, stages, *layer_costs(model, seq_len))
    ends = list(accumulate(counts))
    return [
        Part(tuple(range(end - count, end)), number == 0, number == stages - 1)
        for number, (count, end) in enumerate(zip(counts, ends, strict=True))
    ]


def layer_costs(model: Any, seq_len: int) -> tuple[float, float, float]:
    """FLOPs a token of the embedding, a block, and the head with its loss, forward and backward.

    The embedding multiplies nothing: it is counted as its reads and writes, an addition a number.
    """
    head = 6.0 * model.vocab_size * model.hidden_size
    block = (model.flops_per_token(seq_len) - head) / model.num_layers
    return 3.0 * model.hidden_size, block, head


def balanced(layers: int, stages: int, first: float, block: float, last: float) -> list[int]:
    """Blocks of each stage, at least one, such that the squares of the stages' costs add up to least.

    first and last: what the first and the last stage cost beside their blocks.
    """
    counts = [1] * stages
    # a stage's square grows by ever more: giving each block to whom it costs least is best (a later one if equal)
    costs = [(block + first * (n == 0) + last * (n == stages - 1), -n) for n in range(stages)]
    heapify(costs)
    for _ in range(layers - stages):
        cost, stage = costs[0]
        counts[-stage] += 1
        heapreplace(costs, (cost + block, stage))
    return counts


def stages_of(rank: int, config: ParallelConfig) -> list[int]:
    """The stages of one rank of the pp axis, in ascending order."""
    if config.pp_schedule in V_SHAPED and config.pp > 1:
        return [rank, 2 * config.pp - 1 - rank]
    return list(range(rank, config.num_stages, config.pp))


def rank_of(stage: int, config: ParallelConfig) -> int:
    """The rank on the pp axis that has a stage: round and round, or down and up again for V-shaped schedules."""
    if config.pp_schedule in V_SHAPED and stage >= config.pp:
        return 2 * config.pp - 1 - stage
    return stage % config.pp


def part_of(rank: int, parts: list[Part], config: ParallelConfig) -> Part:
    """All that one rank of the pp axis builds."""
    mine = [parts[stage] for stage in stages_of(rank, config)]
    layers = tuple(layer for part in mine for layer in part.layers)
    return Part(layers, any(part.first for part in mine), any(part.last for part in mine))


def check_micro_batches(config: ParallelConfig, count: int) -> None:
    """Raises ValueError if the schedule cannot run this number of micro-batches."""
    schedule, pp = config.pp_schedule, config.pp
    least = {"gpipe": 1, "dualpipev": 2 * pp}.get(schedule, pp)
    if count < least:
        raise ValueError(
            f"pp_schedule ({schedule}) on pp ({pp}) needs at least {least} micro-batches, not {count}: "
            "make micro_batch_size smaller or batch_size larger"
        )
    rounds = max(1, count // pp)
    if schedule.startswith("interleaved") and count % rounds:
        raise ValueError(
            f"pp_schedule ({schedule}) runs {count} micro-batches in {rounds} rounds, by which they must be divisible"
        )
