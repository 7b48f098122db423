"""What one rank of the pp axis has of a model: counts, which is all that traffic depends on."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tpformer.models.decoder import Part
from tpformer.parallel.split import rank_of, stage_parts, stages_of
from tpformer.parallel_config import ParallelConfig
from tpformer.planner.candidate import Candidate, ModelConfig


@dataclass(frozen=True)
class Share:
    """The stages of one rank, together."""

    blocks: int
    recomputed: int
    """Of the blocks, those that recomputation is asked for."""
    first: bool
    """Has the first stage."""
    last: bool
    """Has the last one."""
    stages: tuple[tuple[int, bool, bool], ...]
    """Of each stage its blocks, and whether it is the first, the last one."""
    before: int
    """Stages whose input comes from another rank."""
    after: int
    """Stages whose output goes to another rank."""
    tied_peer: bool
    """The other end of the model, which has the same embedding, is on another rank."""


def share_of(candidate: Candidate, pp_rank: int) -> Share:
    """Of one rank. Raises ValueError if there is no such rank, and as `split.stage_parts` does."""
    p = candidate.parallel
    if not 0 <= pp_rank < p.pp:
        raise ValueError(f"pp_rank ({pp_rank}) must be in 0..{p.pp - 1}")
    # of all that a layout says, what this depends on: many candidates of a search are one here
    layout = (p.pp, p.pp_schedule, p.stages_per_rank, p.layers_per_stage)
    every = p.recompute_every if p.recompute != "none" else 0
    return _share(candidate.model, candidate.seq_len, layout, every, pp_rank)


@lru_cache(maxsize=4096)
def _share(model: ModelConfig, seq_len: int, layout: tuple[Any, ...], every: int, pp_rank: int) -> Share:
    config, parts = _parts(model, seq_len, layout)
    stages = stages_of(pp_rank, config)
    mine = [parts[stage] for stage in stages]
    layers = [layer for part in mine for layer in part.layers]
    peers = rank_of(0, config), rank_of(config.num_stages - 1, config)
    return Share(
        blocks=len(layers),
        recomputed=sum(layer % every == 0 for layer in layers) if every else 0,
        first=any(part.first for part in mine),
        last=any(part.last for part in mine),
        stages=tuple((len(part.layers), part.first, part.last) for part in mine),
        # V-shaped schedules hand over from a rank to itself where they turn
        before=sum(stage > 0 and rank_of(stage - 1, config) != pp_rank for stage in stages),
        after=sum(stage < len(parts) - 1 and rank_of(stage + 1, config) != pp_rank for stage in stages),
        tied_peer=model.tie_embeddings and peers[0] != peers[1] and pp_rank in peers,
    )


@lru_cache(maxsize=1024)
def _parts(model: ModelConfig, seq_len: int, layout: tuple[Any, ...]) -> tuple[ParallelConfig, list[Part]]:
    pp, schedule, stages_per_rank, layers_per_stage = layout
    config = ParallelConfig(
        pp=pp, pp_schedule=schedule, stages_per_rank=stages_per_rank, layers_per_stage=layers_per_stage
    )
    return config, stage_parts(model, config, seq_len)
