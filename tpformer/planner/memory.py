"""The memory of a rank at the peak of a training step: every byte as a product of numbers that the layout gives."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from tpformer.parallel.split import stages_of
from tpformer.parallel_config import V_SHAPED
from tpformer.planner.activations import Sizes, Terms
from tpformer.planner.alive import alive, put_off
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


class _Option(NamedTuple):
    """A moment that may be the fullest: of one of the rank's stages, with so many micro-batches under way on each."""

    moment: Moment
    stage: int
    counts: tuple[int, ...]
    later: bool
    """Gradients of earlier micro-batches wait."""


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
    options = _options(state, stages, alive(p, pp_rank, candidate.micro_batches), candidate.micro_batches)
    _, best = max(options, key=lambda option: option[0])
    return _memory(candidate, state, stages, best, z, pp_rank)


def _options(
    state: ModelState, stages: list[StageMoments], counts: tuple[int, ...], micro_batches: int
) -> Iterator[tuple[int, _Option]]:
    """Each moment, with the bytes that are not there all the time."""
    times = [(counts, False)]
    if state.sharded and micro_batches > 1:  # once one backward is through
        times.append((tuple(min(count, micro_batches - 1) for count in counts), True))
    for now, later in times:
        waiting = sum(stage.waiting_bytes * count for stage, count in zip(stages, now, strict=True))
        for number, stage in enumerate(stages):
            others = waiting - stage.waiting_bytes
            for moment in stage.moments:
                beside = 0
                if state.sharded:
                    beside = sum(map(total, state.beside(moment, stage.layers, later)))
                yield others + moment.bytes + beside, _Option(moment, number, now, later)


def _memory(
    candidate: Candidate, state: ModelState, stages: list[StageMoments], best: _Option, z: Sizes, pp_rank: int
) -> Memory:
    """The terms of a moment."""
    parameters, gradients, optimizer = state.lasting()
    kept = list(best.moment.kept)
    for number, (stage, count) in enumerate(zip(stages, best.counts, strict=True)):
        others = count - (number == best.stage)
        kept += [one.times(("micro-batches", others)) for one in stage.waiting if others]
    buffers = [
        *best.moment.transient,
        *_standing(candidate, state, stages, z),
        *_under_way(candidate, stages, z, best.counts, pp_rank),
    ]
    if state.sharded:
        sums, beside = state.beside(best.moment, stages[best.stage].layers, best.later)
        gradients, buffers = (*gradients, *sums), [*buffers, *beside]
    terms = dict(zip(PARTS, (parameters, gradients, optimizer, tuple(kept), tuple(buffers)), strict=True))
    return Memory(best.moment.name, terms, *(total(terms[part]) for part in PARTS))


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


def _under_way(candidate: Candidate, stages: list[StageMoments], z: Sizes, counts: tuple[int, ...], rank: int) -> Terms:
    """What has been sent and is not let go of yet, and what weights' gradients that were put off need."""
    p, one = candidate.parallel, z.local("being sent", width=z.stream)
    found = []
    if p.pp > 1 and p.pp_schedule == "1f1b":
        found.append(one.times(("neighbours", stages[0].neighbours)))
    elif p.pp > 1 and p.pp_schedule != "gpipe":  # torch waits for what was sent at the end of a step
        here = p.pp_schedule in V_SHAPED and rank == p.pp - 1  # from one stage of a rank to its other
        sent = sum(
            (candidate.micro_batches - n) * (stage.neighbours - here) for stage, n in zip(stages, counts, strict=True)
        )
        found += [one.times(("sent", sent))] if sent else []
    if stages[-1].deferred and (late := put_off(p, rank)):
        found += [t.times(("micro-batches", late)) for t in stages[-1].deferred]
    return tuple(found)


def explain_memory(memory: Memory) -> str:
    """Every term with its factors, as a table for the terminal."""
    lines = [f"{'MiB':>12}  at its fullest: {memory.moment}"]
    for part in PARTS:
        lines.append(f"{getattr(memory, part) / 2**20:12.2f}  {part}")
        lines += [f"{one.bytes / 2**20:12.2f}    {one.name}: {one}" for one in memory.terms[part]]
    return "\n".join([*lines, f"{memory.total / 2**20:12.2f}  total"])
