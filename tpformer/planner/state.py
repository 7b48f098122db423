"""Parameters, gradients and optimizer state of a rank, and what sharing them out takes while a step runs."""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from tpformer.models.decoder import Part
from tpformer.parallel.state_bytes import StateBytes, state_bytes
from tpformer.planner.activations import Terms
from tpformer.planner.candidate import Candidate, ModelConfig
from tpformer.planner.moments import Moment
from tpformer.planner.terms import term
from tpformer.planner.weights import block_weights, end_weights, numbers, part_weights

Row = tuple[str, int, int]
"""What it is, how many numbers, and bytes of each."""


class Numbers(NamedTuple):
    """How many parameters of a rank there are of each kind."""

    whole: int
    """Of its part of the model."""
    rows: int
    """Of its share of them, where replicas share them out."""
    ends: int
    """Beside the blocks."""
    block: int
    block_rows: int


@lru_cache(maxsize=4096)
def _numbers(model: ModelConfig, tp: int, part: Part, shards: int) -> Numbers:
    block = block_weights(model, tp)
    ends = numbers(end_weights(model, tp, part.first, part.last))
    of_part = part_weights(model, tp, part)
    return Numbers(numbers(of_part), numbers(of_part, shards), ends, numbers(block), numbers(block, shards))


@dataclass(frozen=True)
class ModelState:
    """How many parameters a rank has, and the bytes of each."""

    count: Numbers
    each: StateBytes
    width: int
    """Bytes of what the model computes in."""
    sharded: bool
    """Replicas share something out."""
    at_the_end: bool
    """Gradients are shared out when all micro-batches are through: in a pipeline."""
    offloaded: bool

    @staticmethod
    def of(candidate: Candidate, part: Part) -> "ModelState":
        """Of a rank that has this part."""
        p, shards = candidate.parallel, candidate.shards
        each = state_bytes(p, shards, candidate.micro_batches)
        count = _numbers(candidate.model, p.tp, part, shards)
        return ModelState(count, each, candidate.width, shards > 1, p.pp > 1, p.offload_optimizer)

    def lasting(self) -> tuple[Terms, Terms, Terms]:
        """Parameters, gradients and optimizer state that are there from step to step, on the device."""
        rows, narrow = ("parameters", self.count.rows), self.width == 2 and not self.sharded
        parameters = term("weights to compute with" if narrow else "fp32 weights", rows, ("bytes", 2 if narrow else 4))
        gradients = () if self.sharded else (term("fp32 gradient buckets", rows, ("bytes", 4)),)
        masters = (term("fp32 weights", rows, ("bytes", 4)),) if narrow else ()
        moments = term("AdamW's moments", rows, ("tensors", 2), ("bytes", 4))
        return (parameters,), gradients, () if self.offloaded else (*masters, moments)

    def beside(self, moment: Moment, layers: int, later: bool) -> tuple[list[Row], list[Row]]:
        """Gradients, and what comes and goes, of shared-out state at a moment of a stage of so many layers."""
        count, above = (
            self.count,
            layers - 1 - moment.below,
        )  # blocks that backward is through with; -1 before it begins
        gradients: list[Row] = []
        if self.each.copy:
            transient = [("gathered weights", count.whole, self.width)]
        else:
            blocks = 0 if above < 0 else count.block * (1 + (moment.below > 0))
            transient = [
                ("gathered ends", count.ends, self.width),
                ("gathered blocks, this and the next", blocks, self.width),
            ]
        if later:
            gradients.append(("fp32 sums of micro-batches", count.whole, 4))
        elif above > 0 and not self.at_the_end:
            gradients.append(("fp32 gradients of the blocks above", above * count.block_rows, 4))
            transient.append(("fp32 gradients on their way", count.block, 4))
        transient.append(("gradients of the block so far", moment.gradients, self.width))
        return gradients, transient
