"""What pipeline stages hand to each other: activations down, their gradients up, once a micro-batch each."""

from tpformer.planner.candidate import Candidate
from tpformer.planner.message import DTYPES, WIDTHS, Factors, Traffic
from tpformer.planner.shapes import end_shapes
from tpformer.planner.share import Share


def pp_traffic(candidate: Candidate, share: Share, dp_rank: int) -> list[Traffic]:
    """Of one rank; torch's schedules send while they compute."""
    p = candidate.parallel
    if p.pp == 1:
        return []
    dtype = "float32" if p.fp32_residual else DTYPES[p.precision]
    length = candidate.seq_len // (p.tp if p.sequence_parallel else 1)
    whole: Factors = ("b", candidate.micro_batch_size), ("s/tp" if p.sequence_parallel else "s", length)
    factors = *whole, ("d", candidate.model.hidden_size), ("bytes", WIDTHS[dtype])

    def row(op: str, phase: str, what: str, stages: int) -> Traffic:
        calls = ("micro-batches", candidate.micro_batches), ("stages", stages)
        return Traffic(op, "pp", dtype, phase, what, True, factors, calls)

    found = [
        row("send", "forward", "activations to the next stage", share.after),
        row("recv", "forward", "activations from the stage before", share.before),
        row("send", "backward", "gradient to the stage before", share.before),
        row("recv", "backward", "gradient from the next stage", share.after),
    ]
    return [traffic for traffic in found if traffic.calls] + _tied(candidate, share, dp_rank)


def _tied(candidate: Candidate, share: Share, dp_rank: int) -> list[Traffic]:
    """The first and the last stage exchange the gradient of their embedding: of it, the rows that a replica has."""
    if not share.tied_peer:
        return []
    rows, width = end_shapes(candidate.model, candidate.parallel.tp, share.first, share.last)[0]["embedding.weight"]
    size, shard = -(-rows // candidate.shards), dp_rank % candidate.shards
    mine = min(rows, (shard + 1) * size) - min(rows, shard * size)
    factors = ("rows", mine), ("d", width), ("bytes", 4)
    what = "gradient of the tied embedding"
    return [Traffic(op, "pp", "float32", "forward", what, False, factors, (("steps", 1),)) for op in ("send", "recv")]
