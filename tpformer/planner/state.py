"""Parameters, gradients and optimizer state of a rank, and what sharing them out takes while a step runs."""

from dataclasses import dataclass
from functools import lru_cache

from tpformer.models.decoder import Part
from tpformer.parallel.state_bytes import StateBytes, state_bytes
from tpformer.planner.activations import Terms
from tpformer.planner.candidate import Candidate, ModelConfig
from tpformer.planner.moments import Moment
from tpformer.planner.terms import Term, term
from tpformer.planner.weights import block_weights, end_weights, numbers, part_weights


@dataclass(frozen=True)
class ModelState:
    """How many parameters a rank has, and the bytes of each."""

    model: ModelConfig
    tp: int
    part: Part
    shards: int
    each: StateBytes
    width: int
    """Bytes of what the model computes in."""
    at_the_end: bool
    """Gradients are shared out when all micro-batches are through: in a pipeline."""
    offloaded: bool

    @staticmethod
    def of(candidate: Candidate, pp_rank: int) -> "ModelState":
        """A rank's."""
        p, shards = candidate.parallel, candidate.shards
        each = state_bytes(p, shards, candidate.micro_batches)
        part = candidate.part(pp_rank)
        return ModelState(candidate.model, p.tp, part, shards, each, candidate.width, p.pp > 1, p.offload_optimizer)

    @property
    def sharded(self) -> bool:
        """Whether replicas share anything out."""
        return self.shards > 1

    @property
    def whole(self) -> int:
        """Numbers of the rank's part of the model."""
        return _numbers(self.model, self.tp, self.part, 1)

    @property
    def rows(self) -> int:
        """Numbers of its share of them."""
        return _numbers(self.model, self.tp, self.part, self.shards)

    @property
    def block(self) -> int:
        """Numbers of one block."""
        return numbers(block_weights(self.model, self.tp))

    @property
    def ends(self) -> int:
        """Numbers beside the blocks."""
        return numbers(end_weights(self.model, self.tp, self.part.first, self.part.last))

    def lasting(self) -> tuple[Terms, Terms, Terms]:
        """Parameters, gradients and optimizer state that are there from step to step, on the device."""
        rows, narrow = ("parameters", self.rows), self.width == 2 and not self.sharded
        parameters = term("weights to compute with" if narrow else "fp32 weights", rows, ("bytes", 2 if narrow else 4))
        gradients = () if self.sharded else (term("fp32 gradient buckets", rows, ("bytes", 4)),)
        masters = (term("fp32 weights", rows, ("bytes", 4)),) if narrow else ()
        moments = term("AdamW's moments", rows, ("tensors", 2), ("bytes", 4))
        return (parameters,), gradients, () if self.offloaded else (*masters, moments)

    def beside(self, moment: Moment, layers: int, later: bool) -> tuple[Terms, Terms]:
        """Gradients, and what comes and goes, of shared-out state at a moment of a stage of so many layers."""
        gradients: list[Term] = []
        transient: list[Term] = []
        above = layers - 1 - moment.below  # blocks that backward is through with; -1 before it has begun
        if self.each.copy:
            transient.append(term("gathered weights", ("parameters", self.whole), ("bytes", self.width)))
        else:
            blocks = 0 if above < 0 else 1 + (moment.below > 0)
            transient.append(term("gathered ends", ("parameters", self.ends), ("bytes", self.width)))
            if blocks:
                more = ("blocks", blocks), ("parameters", self.block), ("bytes", self.width)
                transient.append(term("gathered blocks, this and the next", *more))
        if later:
            gradients.append(term("sums of micro-batches", ("parameters", self.whole), ("bytes", 4)))
        elif above > 0 and not self.at_the_end:
            shared = numbers(block_weights(self.model, self.tp), self.shards)
            gradients.append(term("fp32 gradients", ("blocks", above), ("parameters", shared), ("bytes", 4)))
            transient.append(term("gradients being summed", ("parameters", self.block), ("bytes", 4)))
        if moment.gradients:
            transient.append(term("gradients of the block", ("parameters", moment.gradients), ("bytes", self.width)))
        return tuple(gradients), tuple(transient)


@lru_cache(maxsize=4096)
def _numbers(model: ModelConfig, tp: int, part: Part, shards: int) -> int:
    return numbers(part_weights(model, tp, part), shards)
