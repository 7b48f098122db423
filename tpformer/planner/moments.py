"""One micro-batch on one pipeline stage: what it keeps while it waits, and the moments at which most is there."""

from functools import lru_cache
from typing import NamedTuple

from tpformer.models.decoder import Part
from tpformer.planner.activations import Block, Step, Terms, block, ends
from tpformer.planner.candidate import Candidate
from tpformer.planner.sizes import Sizes
from tpformer.planner.terms import Term, term, total
from tpformer.planner.weights import block_weights

LEAST_OFFLOADED = 1 << 20
"""Bytes of a saved storage that stays on the device although activations are offloaded, `parallel.offload`."""
WEIGHTS = ("mlp.down.weight", "mlp.up.weight", "mlp.gate_up.weight", "attention.out.weight", "attention.qkv.weight")
"""In the order of backward; an MLP has one of the second and third."""
AHEAD = 4
"""Storages that come back from the host before they are asked for."""


class Saving(NamedTuple):
    """How activation memory is saved: what a candidate says of it, and no more (moments are kept by it)."""

    recompute: str
    modules: tuple[str, ...]
    every: int
    offload: bool
    defers: bool
    """Weights' gradients wait until after the activations' own (zero bubble)."""
    sharded: bool
    """Replicas share out gradients at least: these stay until those of a whole block, or of the ends, are there."""
    writes: bool
    """A weight's gradient is written before it is added to its sum: bf16 and fp16 on a CPU."""

    @staticmethod
    def of(candidate: Candidate) -> "Saving":
        """A candidate's."""
        p = candidate.parallel
        writes = candidate.on_cpu and candidate.width == 2 and candidate.shards == 1
        direct = not writes and candidate.shards == 1  # what autograd computes comes with the activations'
        defers = p.pp > 1 and p.pp_schedule in ("interleaved_zero_bubble", "zbv") and direct
        sharded = candidate.shards > 1
        modules, every = p.recompute_modules, p.recompute_every
        return Saving(p.recompute, modules, every, p.offload_activations, defers, sharded, writes)


class Moment(NamedTuple):
    """Of a stage's micro-batch: what is kept for backward and what comes and goes."""

    name: str
    kept: Terms
    transient: Terms
    below: int
    """Blocks of the stage that backward has yet to begin."""
    gradients: int
    """Numbers of the current block's gradients that are there, if they wait for the whole of it."""
    kept_bytes: int
    bytes: int
    """Of both."""


class StageMoments(NamedTuple):
    """A stage's."""

    waiting: Terms
    """What a micro-batch keeps from its forward to its backward."""
    waiting_bytes: int
    moments: tuple[Moment, ...]
    deferred: Terms
    """What a micro-batch keeps of which the weights' gradients have been put off."""
    deferred_bytes: int
    layers: int
    neighbours: int
    """Stages that it receives from: activations from the one before, gradients from the one behind."""


@lru_cache(maxsize=4096)
def stage_moments(z: Sizes, saving: Saving, part: Part) -> StageMoments:
    """All moments of a stage that can be its fullest."""
    count = len(part.layers)
    waiting = _below(z, saving, part, count, count + part.first)
    if part.last:
        waiting = (*waiting, *_offloaded(saving, ends(z).saved))
    elif saving.offload and z.local("", width=z.stream).bytes >= LEAST_OFFLOADED:  # the schedule holds on to it
        waiting = (*waiting, z.local("the stage's output", width=z.stream))
    moments: list[Moment] = []
    if part.last:
        kept = _below(z, saving, part, count, count + part.first)
        end = ends(z)
        named = {"the loss's gradient": end.softmax, "the head's gradient": end.products, "the final norm": end.norm}
        moments = [_moment(name, kept, transient, count) for name, transient in named.items()]
    for position in _positions(saving, part):
        moments += _backward(z, saving, part, position)
    deferred = block(z, saving.recompute, saving.modules).waiting if saving.defers else ()
    deferred = tuple(t.times(("blocks", count)) for t in deferred)
    neighbours = 2 - part.first - part.last
    moments = _worth(moments) if saving.sharded else [max(moments, key=lambda moment: moment.bytes)]
    return StageMoments(waiting, total(waiting), tuple(moments), deferred, total(deferred), count, neighbours)


def _worth(moments: list[Moment]) -> list[Moment]:
    """Without those that another one of the same block exceeds in all that counts where state is shared out."""
    found: dict[tuple[int, int], Moment] = {}
    for one in moments:
        key = one.below, one.gradients
        if key not in found or found[key].bytes < one.bytes:
            found[key] = one
    return [one for one in found.values() if not any(_exceeds(other, one) for other in found.values())]


def _exceeds(one: Moment, other: Moment) -> bool:
    more = one.bytes >= other.bytes and one.gradients >= other.gradients
    return one is not other and one.below == other.below and more


def _moment(name: str, kept: Terms, transient: Terms, below: int, gradients: int = 0) -> Moment:
    return Moment(name, kept, transient, below, gradients, total(kept), total((*kept, *transient)))


def _backward(z: Sizes, saving: Saving, part: Part, position: int) -> list[Moment]:
    """The moments of one block's backward; what has been recomputed of it is all there."""
    found, count = block(z, saving.recompute, saving.modules), len(part.layers)
    below = _below(z, saving, part, position, position + part.first)
    last = position == count - 1
    if not part.last:  # the schedule has the stage's output until backward is over
        below = (*below, z.local("the stage's output", width=z.stream))
    order = [weight for name in WEIGHTS for weight in block_weights(z.model, z.tp) if weight.name.startswith(name)]
    moments = []
    again = _recomputed(saving, part.layers[position])
    for step in found.steps_again if again else found.steps:
        saved = step.saved if not saving.offload else _brought_back(z, found, step, position, again)
        arrived = last and not part.last and step.weights <= 2  # it lies in the buffer that it was received into
        transient = step.transient[arrived:]
        if saving.defers:
            above = count - 1 - position
            transient += (*step.waiting, *(t.times(("blocks", above)) for t in found.waiting if above))
        if saving.writes:
            weight = order[step.weights - 1].numbers()
            transient += (term("gradient of a weight", ("parameters", weight), ("bytes", z.width)),)
        if part.last and (saving.sharded or (part.first and z.model.tie_embeddings)):  # until the embedding's own
            transient += ends(z).head
        done = sum(weight.numbers() for weight in order[: step.weights])
        name = f"backward of block {part.layers[position]}, {step.name}"
        moments.append(_moment(name, (*below, *saved), transient, position, done))
    return moments


def _brought_back(z: Sizes, found: Block, step: Step, position: int, again: bool) -> Terms:
    """Of what is offloaded, what a step needs, and what comes ahead of it; what is recomputed has never left."""
    stream = z.local("input of the block", width=z.stream)
    if again:
        return (*step.saved, *(stream,) * min(position + 1, 1 + AHEAD))
    before = found.order if position else ()
    count = max(step.own, AHEAD + (step.own > 0))  # one that is asked for is ahead no longer
    return (*found.order, stream, *before)[step.first : step.first + count]


def _positions(saving: Saving, part: Part) -> list[int]:
    """The blocks of which one's backward can be the fullest: the last, the last that was not recomputed, the first."""
    count = len(part.layers)
    plain = [n for n, layer in enumerate(part.layers) if not _recomputed(saving, layer)]
    again = [n for n, layer in enumerate(part.layers) if _recomputed(saving, layer)]
    return sorted({0, max(0, count - 2), *plain[-1:], *again[-1:]}, reverse=True)


def _recomputed(saving: Saving, layer: int) -> bool:
    return saving.recompute != "none" and layer % saving.every == 0


def _below(z: Sizes, saving: Saving, part: Part, blocks: int, streams: int) -> Terms:
    """What backward needs of a stage's first blocks, and of the embedding."""
    found = block(z, saving.recompute, saving.modules)
    again = sum(_recomputed(saving, layer) for layer in part.layers[:blocks])
    terms = [t.times(("blocks", blocks - again)) for t in found.saved if blocks > again]
    terms += [t.times(("recomputed blocks", again)) for t in found.kept if again]
    if streams:
        terms.append(z.local("residual stream between blocks", width=z.stream).times(("blocks", streams)))
    kept = _offloaded(saving, tuple(terms))
    return (*kept, *ends(z).rotations, *(ends(z).embedding if part.first else ()))


def _offloaded(saving: Saving, terms: Terms) -> Terms:
    """What of it stays on the device."""
    return terms if not saving.offload else tuple(t for t in terms if _storage(t) < LEAST_OFFLOADED)


def _storage(t: Term) -> int:
    """Bytes of one tensor."""
    copies = 1
    for label, number in t.factors:
        copies *= number if label in ("tensors", "blocks", "recomputed blocks") else 1
    return t.bytes // copies
