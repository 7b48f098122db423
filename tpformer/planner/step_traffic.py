"""What a step's collectives carry, layer by layer and together; of a candidate."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from tpformer.planner.candidate import Candidate
from tpformer.planner.message import DTYPES, WIDTHS, Traffic
from tpformer.planner.shapes import block_shapes, count, end_shapes
from tpformer.planner.share import Share, share_of
from tpformer.planner.tp_traffic import layers_traffic
from tpformer.planner.traffic import axis_size, traffic


@dataclass(frozen=True)
class LayerTraffic:
    """One layer, or several alike."""

    name: str
    alike: int
    """How many there are."""
    parameters: int
    """That one rank has, of one of them."""
    gradient_bytes: int
    """What replicas sum of one of them in a step."""
    output_bytes: int
    """Of a micro-batch, of one of them: what a pipeline stage that ends there hands over. 0: no tensor."""
    sends: tuple[Traffic, ...] = ()
    """What one of them sends of its own as it runs: tensor parallelism's."""


@dataclass(frozen=True)
class StepTraffic:
    """One rank's, of one step."""

    layers: tuple[LayerTraffic, ...]
    step: tuple[Traffic, ...]
    """All that it sends, also what is sent once for all layers."""
    sizes: Mapping[str, int]
    """Ranks of each axis."""

    def calls(self, axis: str = "") -> int:
        """Collectives of a step, on one axis or on all."""
        return sum(each.calls for each in self.step if axis in ("", each.axis))

    def carried(self, axis: str = "") -> int:
        """Their bytes: of each its unsharded side."""
        return sum(each.total for each in self.step if axis in ("", each.axis))

    def sent(self, axis: str = "") -> int:
        """Bytes that this rank sends, by ring algorithms."""
        return sum(each.sent(self.sizes[each.axis]) for each in self.step if axis in ("", each.axis))


def step_traffic(candidate: Candidate, pp_rank: int = 0, *, dp_rank: int = 0) -> StepTraffic:
    """Of one rank of a candidate. Raises ValueError as `traffic` does."""
    share, p = share_of(candidate, pp_rank), candidate.parallel
    width = 4 if p.fp32_residual else WIDTHS[DTYPES[p.precision]]
    tokens = candidate.micro_batch_size * candidate.seq_len // (p.tp if p.sequence_parallel else 1)
    stream = tokens * candidate.model.hidden_size * width
    before, after = (
        count(shapes) for shapes in end_shapes(candidate.model, candidate.parallel.tp, share.first, share.last)
    )
    block, plain = count(block_shapes(candidate.model, candidate.parallel.tp)), share.blocks - share.recomputed

    def layer(name: str, alike: int, parameters: int, output: int, part: Share) -> LayerTraffic:
        sends = tuple(layers_traffic(candidate, part))
        return LayerTraffic(name, alike, parameters, 4 * parameters, output, sends)

    nothing = replace(share, blocks=0, recomputed=0, first=False, last=False)
    layers = [
        layer("embedding", 1, before, stream * share.first, replace(nothing, first=share.first)),
        layer("block", plain, block, stream, replace(nothing, blocks=1)),
        layer("block, recomputed", share.recomputed, block, stream, replace(nothing, blocks=1, recomputed=1)),
        layer("norm, head, loss", 1, after, 0, replace(nothing, last=share.last)),
    ]
    found = traffic(candidate, pp_rank, dp_rank=dp_rank)
    present = tuple(each for each in layers if each.alike and (each.parameters or each.sends))
    return StepTraffic(present, found, {each.axis: axis_size(candidate, each.axis) for each in found})
