"""The memory of a rank at the peak of a training step: every byte as a product of numbers that the layout gives."""

from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from tpformer.models.decoder import Part
from tpformer.parallel.split import part_of, stage_parts, stages_of
from tpformer.parallel_config import V_SHAPED, ParallelConfig
from tpformer.planner.activations import Terms
from tpformer.planner.alive import alive, at_the_end, put_off
from tpformer.planner.candidate import Candidate, ModelConfig
from tpformer.planner.moments import Moment, Saving, StageMoments, stage_moments
from tpformer.planner.sizes import Sizes
from tpformer.planner.state import ModelState, Row
from tpformer.planner.terms import term, total

PARTS = ("parameters", "gradients", "optimizer", "activations", "buffers")
SLOTS, SLOT_NUMBERS = 3, 2 << 20
"""Buffers through which offloaded optimizer state passes, and what one holds of each of its tensors."""


class UnderWay(NamedTuple):
    """The micro-batches of a rank at some time of a step."""

    counts: tuple[int, ...]
    """Of each of its stages, those that wait for their backward or are in it."""
    put_off: int = 0
    """Those of which the weights' gradients are still to come."""
    later: bool = False
    """Gradients of earlier ones have been added up."""


class Fullest(NamedTuple):
    """The moment at which most is there, on one of a rank's stages."""

    moment: Moment
    stage: int
    now: UnderWay
    state: ModelState
    stages: list[StageMoments]
    standing: Terms
    """Buffers that do not come and go with it."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the fullest moment of a step, and what they are made of."""

    parameters: int
    """What the model computes with between steps: fp32, or the narrow copy; of FSDP the rank's fp32 rows."""
    gradients: int
    """fp32 sums that are there at that moment: buckets, what micro-batches added up, or the rank's rows."""
    optimizer: int
    """AdamW's moments and, where the model computes in another dtype, the fp32 weights; nothing that is on the host."""
    activations: int
    """What backward keeps of the forwards of all micro-batches under way."""
    buffers: int
    """What comes and goes: gathered parameters, gradients on their way, logits, receive buffers, offload's slots."""
    fullest: Fullest = field(repr=False, compare=False)

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers

    @property
    def moment(self) -> str:
        """When it is."""
        return self.fullest.moment.name

    @property
    def terms(self) -> dict[str, Terms]:
        """What each of PARTS is made of."""
        moment, stage, now, state, stages, standing = self.fullest
        lasting, kept, buffers = state.lasting(), list(moment.kept), [*moment.transient, *standing]
        for number, (waiting, *_) in enumerate(stages):
            others = now.counts[number] - (number == stage)
            kept += [one.times(("micro-batches", others)) for one in waiting if others]
        kept += [one.times(("micro-batches", now.put_off)) for one in stages[-1].deferred if now.put_off]
        sums, beside = map(_terms, _beside(self.fullest))
        parts = lasting[0], (*lasting[1], *sums), lasting[2], tuple(kept), (*buffers, *beside)
        return dict(zip(PARTS, parts, strict=True))


def _beside(fullest: Fullest) -> tuple[list[Row], list[Row]]:
    moment, stage, now, state, stages, _ = fullest
    return state.beside(moment, stages[stage].layers, now.later) if state.sharded else ([], [])


def _terms(rows: list[Row]) -> Terms:
    return tuple(term(name, ("parameters", count), ("bytes", width)) for name, count, width in rows if count)


@lru_cache(maxsize=16384)
def _parts(model: ModelConfig, p: ParallelConfig, seq_len: int, pp_rank: int) -> tuple[tuple[Part, ...], Part]:
    """Those of a rank's stages, and all that it has."""
    parts = stage_parts(model, p, seq_len)
    return tuple(parts[stage] for stage in stages_of(pp_rank, p)), part_of(pp_rank, parts, p)


def memory(candidate: Candidate, pp_rank: int = 0, tp_rank: int = 0) -> Memory:
    """The bytes of a rank at the fullest moment of a step, without processes and without the model.

    Parameters, gradients and optimizer state are exact. Activations are what the layers' Functions save and what the
    moment of their backward takes; a GPU's allocator rounds each tensor up and keeps what it has freed, torch's
    libraries have workspaces of their own, and of what one operator takes for itself nothing is counted. Dropout counts
    as 0, a compiled block as one that is not, and matmuls as if they took turns with their communication.
    Where replicas share rows out, the one that has most is counted. tp_rank: all have the same.
    Raises ValueError for a rank that the layout has not.
    """
    p = candidate.parallel
    for name, rank, size in (("pp_rank", pp_rank, p.pp), ("tp_rank", tp_rank, p.tp)):
        if not 0 <= rank < size:
            raise ValueError(f"{name} ({rank}) must be in 0..{size - 1}")
    z, saving = Sizes.of(candidate), Saving.of(candidate)
    mine, part = _parts(candidate.model, p, candidate.seq_len, pp_rank)
    stages = [stage_moments(z, saving, one) for one in mine]
    state = ModelState.of(candidate, part)
    moment, number, now = _fullest(state, stages, _times(candidate, state, pp_rank))
    standing = (*_standing(candidate, state, stages, z), *_sent(candidate, stages, z, now, pp_rank))
    fullest = Fullest(moment, number, now, state, stages, standing)
    sums, beside = map(_size, _beside(fullest))
    parameters, gradients, optimizer = map(total, state.lasting())
    waiting = _waiting(stages, now) - stages[number].waiting_bytes
    buffers = moment.bytes - moment.kept_bytes + total(standing) + beside
    return Memory(parameters, gradients + sums, optimizer, waiting + moment.kept_bytes, buffers, fullest)


def _times(candidate: Candidate, state: ModelState, pp_rank: int) -> list[UnderWay]:
    """When most can be there: at the first backward, at a later one, and near the end."""
    p, count = candidate.parallel, candidate.micro_batches
    first = UnderWay(alive(p, pp_rank, count), put_off(p, pp_rank))
    times = [first]
    if p.pp_schedule == "zbv" and p.pp > 1:
        times.append(UnderWay(*at_the_end(p, pp_rank, count)))
    if state.sharded and count > 1:
        times = [time._replace(counts=tuple(min(n, count - 1) for n in time.counts), later=True) for time in times]
        times.append(first)
    return times


def _fullest(state: ModelState, stages: list[StageMoments], times: list[UnderWay]) -> tuple[Moment, int, UnderWay]:
    """The moment, the stage whose it is, and what is under way then."""
    most, found = -1, None
    for now in times:
        waiting = _waiting(stages, now)
        for number, stage in enumerate(stages):
            if not now.counts[number]:
                continue
            for moment in stage.moments:
                size = waiting - stage.waiting_bytes + moment.bytes
                if state.sharded:
                    size += sum(map(_size, state.beside(moment, stage.layers, now.later)))
                if size > most:
                    most, found = size, (moment, number, now)
    assert found is not None  # every rank has a stage, and that a block
    return found


def _waiting(stages: list[StageMoments], now: UnderWay) -> int:
    """Bytes of all micro-batches under way, were each to wait."""
    found = now.put_off * stages[-1].deferred_bytes
    return found + sum(stage.waiting_bytes * count for stage, count in zip(stages, now.counts, strict=True))


def _size(rows: list[Row]) -> int:
    return sum(count * width for _, count, width in rows)


def _standing(candidate: Candidate, state: ModelState, stages: list[StageMoments], z: Sizes) -> Terms:
    """Buffers that are there all the time: samples, what stages receive into, and offload's slots."""
    p, samples = candidate.parallel, candidate.batch_size // candidate.dp
    copies = 3 if p.pp > 1 else 1
    found = [term("samples", ("tensors", copies), ("samples", samples), ("s", candidate.seq_len + 1), ("bytes", 8))]
    sides = sum(stage.neighbours for stage in stages)
    if sides:
        buffer = z.local("receive buffers", width=z.stream)
        found.append(buffer.times(("from neighbours", sides), ("micro-batches", candidate.micro_batches)))
    if p.offload_optimizer:
        tensors = 3 if candidate.width == 2 and not state.sharded else 2
        slots = ("slots", SLOTS), ("tensors", tensors), ("numbers", SLOT_NUMBERS), ("bytes", 4)
        found.append(term("optimizer state on its way", *slots))
    return tuple(found)


def _sent(candidate: Candidate, stages: list[StageMoments], z: Sizes, now: UnderWay, rank: int) -> Terms:
    """What has been sent to other stages and is not let go of yet."""
    p, one = candidate.parallel, z.local("sent", width=z.stream)
    if p.pp == 1 or p.pp_schedule == "gpipe":
        return ()
    if p.pp_schedule == "1f1b":
        return (one.times(("neighbours", stages[0].neighbours)),)
    # torch waits for what was sent at the end of a step; from one stage of a rank to its other nothing is
    here = p.pp_schedule in V_SHAPED and rank == p.pp - 1
    counts = (now.counts[0],) * 2 if p.pp_schedule in V_SHAPED else now.counts
    done = zip(stages, counts, strict=True)
    sent = sum((candidate.micro_batches - count) * (stage.neighbours - here) for stage, count in done)
    return (one.times(("tensors", sent)),) if sent else ()


def explain_memory(memory: Memory) -> str:
    """Every term with its factors, as a table for the terminal."""
    lines = [f"{'MiB':>12}  at its fullest: {memory.moment}"]
    for part, terms in memory.terms.items():
        lines.append(f"{getattr(memory, part) / 2**20:12.2f}  {part}")
        lines += [f"{one.bytes / 2**20:12.2f}    {one.name}: {one}" for one in terms]
    return "\n".join([*lines, f"{memory.total / 2**20:12.2f}  total"])
