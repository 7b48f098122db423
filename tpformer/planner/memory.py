"""The memory of a rank at the peak of a training step: every byte as a product of numbers that the layout gives."""

from dataclasses import dataclass
from typing import NamedTuple

from tpformer.parallel.split import stages_of
from tpformer.parallel_config import V_SHAPED
from tpformer.planner.activations import Sizes, Terms
from tpformer.planner.alive import alive, at_the_end, put_off
from tpformer.planner.candidate import Candidate
from tpformer.planner.moments import Moment, Saving, StageMoments, stage_moments
from tpformer.planner.state import ModelState
from tpformer.planner.terms import term, total

PARTS = ("parameters", "gradients", "optimizer", "activations", "buffers")
SLOTS, SLOT_NUMBERS = 3, 2 << 20
"""Buffers through which offloaded optimizer state passes, and what one holds of each of its tensors."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank at the fullest moment of a step, and what they are made of."""

    moment: str
    """When that is."""
    terms: dict[str, Terms]
    """Of each of PARTS."""
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

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers


class _UnderWay(NamedTuple):
    """The micro-batches of a rank at some time of a step."""

    counts: tuple[int, ...]
    """Of each of its stages, those that wait for their backward or are in it."""
    put_off: int = 0
    """Those of which the weights' gradients are still to come."""
    later: bool = False
    """Gradients of earlier ones have been added up."""


def memory(candidate: Candidate, pp_rank: int = 0, tp_rank: int = 0) -> Memory:
    """The bytes of a rank at the fullest moment of a step, without processes and without the model.

    Parameters, gradients and optimizer state are exact. Activations are what the layers' Functions save and what the
    moment of their backward takes; a GPU's allocator rounds each tensor up and keeps what it has freed, torch's
    libraries have workspaces of their own, and of what one operator takes for itself nothing is counted.
    Where replicas share rows out, the one that has most is counted. tp_rank: all have the same.
    Raises ValueError for a rank that the layout has not.
    """
    p = candidate.parallel
    for name, rank, size in (("pp_rank", pp_rank, p.pp), ("tp_rank", tp_rank, p.tp)):
        if not 0 <= rank < size:
            raise ValueError(f"{name} ({rank}) must be in 0..{size - 1}")
    z, saving, parts = Sizes.of(candidate), Saving.of(candidate), candidate.parts
    stages = [stage_moments(z, saving, parts[stage]) for stage in stages_of(pp_rank, p)]
    state = ModelState.of(candidate, pp_rank)
    options = [
        (_bytes(state, stages, moment, number, now), moment, number, now)
        for now in _times(candidate, state, pp_rank)
        for number, stage in enumerate(stages)
        if now.counts[number]
        for moment in stage.moments
    ]
    _, moment, number, now = max(options, key=lambda option: option[0])
    standing = (*_standing(candidate, state, stages, z), *_sent(candidate, stages, z, now, pp_rank))
    return _memory(state, stages, moment, number, now, standing)


def _times(candidate: Candidate, state: ModelState, pp_rank: int) -> list[_UnderWay]:
    """When most can be there: at the first backward, at a later one, and near the end."""
    p, count = candidate.parallel, candidate.micro_batches
    first = _UnderWay(alive(p, pp_rank, count), put_off(p, pp_rank))
    if p.pp_schedule == "zbv":
        return [first, _UnderWay(*at_the_end(p, pp_rank, count))]
    if state.sharded and count > 1:
        return [first, first._replace(counts=tuple(min(n, count - 1) for n in first.counts), later=True)]
    return [first]


def _bytes(state: ModelState, stages: list[StageMoments], moment: Moment, number: int, now: _UnderWay) -> int:
    """Of a moment of one of the rank's stages, all that is not there all the time."""
    found = moment.bytes - stages[number].waiting_bytes + now.put_off * stages[-1].deferred_bytes
    for stage, count in zip(stages, now.counts, strict=True):
        found += stage.waiting_bytes * count
    if state.sharded:
        found += sum(map(total, state.beside(moment, stages[number].layers, now.later)))
    return found


def _memory(
    state: ModelState, stages: list[StageMoments], moment: Moment, number: int, now: _UnderWay, standing: Terms
) -> Memory:
    """The terms of a moment."""
    parameters, gradients, optimizer = state.lasting()
    kept, buffers = list(moment.kept), [*moment.transient, *standing]
    for stage, count in zip(stages, now.counts, strict=True):
        others = count - (stage is stages[number])
        kept += [one.times(("micro-batches", others)) for one in stage.waiting if others]
    kept += [one.times(("micro-batches", now.put_off)) for one in stages[-1].deferred if now.put_off]
    if state.sharded:
        sums, beside = state.beside(moment, stages[number].layers, now.later)
        gradients, buffers = (*gradients, *sums), [*buffers, *beside]
    terms = dict(zip(PARTS, (parameters, gradients, optimizer, tuple(kept), tuple(buffers)), strict=True))
    return Memory(moment.name, terms, *(total(terms[part]) for part in PARTS))


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


def _sent(candidate: Candidate, stages: list[StageMoments], z: Sizes, now: _UnderWay, rank: int) -> Terms:
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
    for part in PARTS:
        lines.append(f"{getattr(memory, part) / 2**20:12.2f}  {part}")
        lines += [f"{one.bytes / 2**20:12.2f}    {one.name}: {one}" for one in memory.terms[part]]
    return "\n".join([*lines, f"{memory.total / 2**20:12.2f}  total"])
