"""Every collective that one rank issues in one training step, predicted: as `tpformer.trace` would record it."""

from tpformer.planner.candidate import Candidate
from tpformer.planner.dp_traffic import dp_traffic
from tpformer.planner.message import Traffic
from tpformer.planner.network import group
from tpformer.planner.pp_traffic import pp_traffic
from tpformer.planner.share import share_of
from tpformer.planner.tp_traffic import tp_traffic

__all__ = ["Traffic", "axis_size", "traffic"]

NORM_SUMS = 3
"""fp64 numbers of the step's last all-reduce: the squared norm, the loss, whether to stop."""


def traffic(candidate: Candidate, pp_rank: int = 0, *, dp_rank: int = 0) -> tuple[Traffic, ...]:
    """Of forward, backward, the reduction of gradients and their norm; all tp ranks have the same.

    Beside pp_rank, dp_rank matters where replicas share out rows of which only some are copies, or tied.
    Of a pipeline, any step but the first, in which torch's stages also greet their neighbours.
    Raises ValueError if there is no such rank, or tp does not divide the vocabulary.
    """
    if not 0 <= dp_rank < candidate.dp:
        raise ValueError(f"dp_rank ({dp_rank}) must be in 0..{candidate.dp - 1}")
    share = share_of(candidate, pp_rank)
    found = tp_traffic(candidate, share, dp_rank)
    found += pp_traffic(candidate, share, dp_rank)
    found += dp_traffic(candidate, share, pp_rank)
    if candidate.world_size > 1:
        factors = ("sums", NORM_SUMS), ("bytes", 8)
        what, calls = "gradient norm, with the loss", (("steps", 1),)
        found.append(Traffic("all_reduce", _world(candidate), "float64", "forward", what, False, factors, calls))
    return tuple(found)


def axis_size(candidate: Candidate, axis: str) -> int:
    """Ranks of a mesh axis, by the name that the trace has for it."""
    return group(axis, candidate.parallel, candidate.shards)[0]


def _world(candidate: Candidate) -> str:
    """The name of all ranks together: that of an axis which has them all."""
    p = candidate.parallel
    sizes = (("pp", p.pp), ("dp", candidate.dp), ("tp", p.tp))
    return next((name for name, size in sizes if size == candidate.world_size), "world")
