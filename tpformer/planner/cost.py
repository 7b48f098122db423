"""How long a training step takes, as a sum of terms that each can be read."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from tpformer.models.decoder import Part
from tpformer.parallel_config import V_SHAPED, ZERO_BUBBLE
from tpformer.planner.candidate import Candidate
from tpformer.planner.machine import Device, Link
from tpformer.planner.network import group, path
from tpformer.planner.traffic import Traffic
from tpformer.planner.work import Work, block_work, first_work, last_work, sizes, vocabulary

Kind = Literal["compute", "recompute", "bubble", "tp", "pp", "dp", "optimizer"]
MOST_CHUNKS = 4
"""Into which overlap.py cuts what it runs beside matmuls."""
UNFUSED_ATTENTION_EFFICIENCY = 0.5
"""Of batched products as narrow as a head."""


@dataclass(frozen=True)
class Term:
    """A part of the step: its factors' product is its seconds."""

    kind: Kind
    what: str
    factors: tuple[tuple[str, float], ...]

    @property
    def seconds(self) -> float:
        """How long it takes."""
        product = 1.0
        for _, number in self.factors:
            product *= number
        return product


@dataclass(frozen=True)
class StepTime:
    """One step of the busiest rank, and what it waits for."""

    terms: tuple[Term, ...]

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return sum(term.seconds for term in self.terms)

    def of(self, *kinds: Kind) -> float:
        """Seconds of these kinds of term."""
        return sum(term.seconds for term in self.terms if term.kind in kinds)


@dataclass(frozen=True)
class Machine:
    """What a candidate runs on. fused_attention False: as before FlashAttention, for old measurements."""

    device: Device
    network: Link
    fused_attention: bool = True


@dataclass(frozen=True)
class Pace:
    """Seconds for a unit of each kind of work."""

    matmul: float
    """A FLOP."""
    attention: float
    """A FLOP."""
    bytes: float
    overhead: float
    """A block's forward and backward."""

    def seconds(self, work: Work) -> float:
        """All of it, one after the other."""
        return work.matmul * self.matmul + work.attention * self.attention + work.bytes * self.bytes


@dataclass(frozen=True)
class RankTime:
    """What one rank computes for one micro-batch, and how long it takes; communication left out."""

    rank: int
    part: Part
    work: tuple[Work, Work]
    """Of forward and backward."""
    forward: float
    """Seconds."""
    backward: float
    recompute: float

    @property
    def all(self) -> float:
        """Forward and backward, with what is computed again."""
        return self.forward + self.backward + self.recompute


def pace(candidate: Candidate, machine: Machine) -> Pace:
    """Matmuls at the rate of large ones, all bytes at the memory's. Raises ValueError as Device.peak does."""
    device = machine.device
    rate = device.peak(candidate.parallel.precision) * device.matmul_efficiency
    share = device.attention_efficiency if machine.fused_attention else UNFUSED_ATTENTION_EFFICIENCY
    bandwidth = device.bandwidth * device.bandwidth_efficiency
    return Pace(1 / rate, 1 / (rate * share), 1 / bandwidth, device.overhead)


def rank_times(candidate: Candidate, machine: Machine) -> list[RankTime]:
    """Each kind of rank on the pp axis once: as it has more or fewer blocks, and which ends."""
    s, width, unit = sizes(candidate), candidate.width, pace(candidate, machine)
    block = block_work(s, candidate.seq_len, width, machine.fused_attention)
    first, last = first_work(s, width), last_work(s, vocabulary(candidate), width)
    again = _recomputed(candidate, block[0], unit)
    found = []
    for rank, part in candidate.rank_kinds:
        count = len(part.layers)
        forward, backward = (
            block[phase].times(count) + first[phase].times(part.first) + last[phase].times(part.last)
            for phase in (0, 1)
        )
        seconds = [
            unit.seconds(forward) + count * unit.overhead / 3,
            unit.seconds(backward) + count * unit.overhead * 2 / 3,
        ]
        found.append(RankTime(rank, part, (forward, backward), seconds[0], seconds[1], count * again))
    return found


def _shared_cores(candidate: Candidate, times: list[RankTime], machine: Machine, alone: float) -> Iterator[Term]:
    """What processes that share a CPU's cores take longer than `alone`, each on its own: until all work is done."""
    if candidate.on_cpu and candidate.world_size > machine.device.per_node:
        kinds = {(len(time.part.layers), time.part.first, time.part.last): time.all for time in times}
        parts = [candidate.part(rank) for rank in range(candidate.parallel.pp)]
        work = sum(kinds[len(part.layers), part.first, part.last] for part in parts)
        ranks = candidate.parallel.tp * candidate.dp
        whole = candidate.micro_batches * work * ranks / machine.device.per_node
        yield Term("compute", "waiting for a core", (("s longer than computing and idling", max(0.0, whole - alone)),))


def _recomputed(candidate: Candidate, forward: Work, unit: Pace) -> float:
    """Seconds of a block that backward computes again, on average over all blocks.

    Of modules, attention's FLOPs and, of all else, as much as their share of the weights.
    """
    p = candidate.parallel
    if p.recompute == "none":
        return 0.0
    core = forward.attention * unit.attention
    rest = unit.seconds(forward) - core + unit.overhead / 3
    if p.recompute == "full":
        return (rest + core) / p.recompute_every
    s = sizes(candidate)
    share = sum(a * b for a, b in s.matrices[:2]) / s.weights
    named = {"attention.core": core, "attention": core + share * rest, "mlp": (1 - share) * rest}
    return sum(named.get(module, 0.0) for module in p.recompute_modules) / p.recompute_every


def bubble_seconds(candidate: Candidate, forward: float, backward: float, more: float = 0.0) -> float:
    """What the busiest rank idles: the fill and the drain of the pipeline.

    forward, backward: of a rank's whole part, for one micro-batch; more: what backward takes longer for recomputation
    and communication. Zero-bubble schedules fill the wait with the weights' gradients, half of a backward. Sources:
    arXiv 2104.04473, section 2.2; 2401.10241; `bubble.theoretical_bubble` runs the orders themselves, a test compares.
    """
    p = candidate.parallel
    rounds = p.num_stages // p.pp
    wait = forward + backward + more
    if p.pp_schedule in ZERO_BUBBLE:  # forward and the inputs' gradients, less the weights'
        wait = forward + (backward / 2 + more) - backward / 2
        if p.pp_schedule in V_SHAPED and candidate.micro_batches < 2 * p.pp:
            wait *= rounds
    return (p.pp - 1) * wait / rounds


def step_time(candidate: Candidate, times: list[RankTime], traffic: Iterable[Traffic], machine: Machine) -> StepTime:
    """The whole step, by the rank that computes longest, and its traffic; times: as `rank_times` gives them.

    Collectives of tp and pp are waited for; those of dp, and under sequence parallelism tp's, run beside the
    computation that they can run beside, on GPUs. On a CPU they take its cores.
    """
    busiest = max(times, key=lambda time: time.all)
    m, unit = float(candidate.micro_batches), pace(candidate, machine)
    terms = [*_computed("forward", m, busiest.work[0], unit), *_computed("backward", m, busiest.work[1], unit)]
    if unit.overhead:
        factors = (("micro-batches", m), ("blocks", float(len(busiest.part.layers))), ("s", unit.overhead))
        terms.append(Term("compute", "launching operators", factors))
    if busiest.recompute:
        terms.append(Term("recompute", "forward again", (("micro-batches", m), ("seconds", busiest.recompute))))
    communication = list(_communication(candidate, traffic, machine, busiest))
    terms += communication
    waits = sum(term.seconds for term in communication if term.kind == "tp") / m
    if candidate.parallel.pp > 1:
        more = busiest.recompute + waits * 2 / 3
        idle = bubble_seconds(candidate, busiest.forward + waits / 3, busiest.backward, more)
        terms.append(Term("bubble", f"{candidate.parallel.pp_schedule}: fill and drain", (("seconds", idle),)))
    alone = sum(term.seconds for term in terms if term.kind in ("compute", "recompute", "bubble"))
    terms += _shared_cores(candidate, times, machine, alone)
    return StepTime((*terms, _update(candidate, machine, busiest)))


def _computed(phase: str, micro_batches: float, work: Work, unit: Pace) -> Iterator[Term]:
    parts = (("matmuls", "FLOPs", work.matmul, unit.matmul), ("attention", "FLOPs", work.attention, unit.attention))
    for what, name, amount, each in (*parts, ("memory", "bytes", work.bytes, unit.bytes)):
        factors = (("micro-batches", micro_batches), (name, amount), (f"s/{name[:-1]}", each))
        yield Term("compute", f"{phase}, {what}", factors)


def _communication(
    candidate: Candidate, traffic: Iterable[Traffic], machine: Machine, busiest: RankTime
) -> Iterator[Term]:
    p = candidate.parallel
    hidden = {"tp": 0.0, "forward": 0.0, "backward": 0.0}
    for item in traffic:
        if item.op == "send":  # what arrives is waited for; what leaves goes beside it
            continue
        size, stride = group(item.axis, p, candidate.shards)
        op = "send" if item.op == "recv" else item.op
        # processes on CPUs are those of one machine, however many share a core
        way = machine.device.link if candidate.on_cpu else path(size, stride, machine.device, machine.network)
        each = way.seconds(op, item.bytes, size)
        kind: Kind = "tp" if item.axis == "tp" else "pp" if item.axis == "pp" else "dp"
        if kind == "dp" and op != "all_reduce":  # FSDP copies parameters out of what it gathered, gradients into it
            each += 2 * item.bytes * pace(candidate, machine).bytes
        if item.hidden and kind != "pp" and not candidate.on_cpu:
            hidden["tp" if kind == "tp" else item.phase] += each * item.calls
        else:
            yield Term(kind, f"{item.op} {item.axis}: {item.what}", (("calls", float(item.calls)), ("s", each)))
    m = candidate.micro_batches
    if hidden["tp"]:  # the first chunk has nothing beside it
        first = hidden["tp"] / MOST_CHUNKS
        yield _exposed("tp", "regions", hidden["tp"], first + max(0.0, hidden["tp"] - first - m * busiest.all))
    # gathered once a step, they have one micro-batch's computation beside them
    beside = m if p.dp_mode in ("fsdp", "hsdp") and p.pp == 1 else 1
    for phase, computing in (("forward", busiest.forward), ("backward", busiest.backward + busiest.recompute)):
        if hidden[phase]:
            yield _exposed("dp", phase, hidden[phase], max(0.0, hidden[phase] - beside * computing))


def _exposed(kind: Kind, what: str, beside: float, exposed: float) -> Term:
    return Term(kind, f"{what}: {1e3 * beside:.1f} ms beside the computation", (("s longer than it", exposed),))


def _update(candidate: Candidate, machine: Machine, rank: RankTime) -> Term:
    """AdamW reads gradient, weight and moments, writes the latter three and the copy that computes; the norm reads."""
    head = candidate.model.hidden_size * vocabulary(candidate)
    ends = max(rank.part.first, rank.part.last) if candidate.model.tie_embeddings else rank.part.first + rank.part.last
    parameters = len(rank.part.layers) * sizes(candidate).weights + ends * head
    moved = 32.0 + (candidate.width if candidate.width < 4 else 0)
    crowd = max(1.0, candidate.world_size / machine.device.per_node) if candidate.on_cpu else 1.0
    factors = (("parameters", float(parameters)), ("bytes", moved), ("1/shards", 1 / candidate.shards))
    each = crowd * pace(candidate, machine).bytes
    return Term("optimizer", "AdamW and the gradients' norm", (*factors, ("s/byte", each)))


@lru_cache(maxsize=64)
def model_flops(candidate: Candidate) -> float:
    """FLOPs of a step by the usual count: 6 a weight and token, and the whole square of attention."""
    return float(candidate.model.flops_per_token(candidate.seq_len)) * candidate.batch_size * candidate.seq_len


def mfu(candidate: Candidate, step_seconds: float, device: Device) -> float:
    """Model FLOPs utilisation (arXiv 2204.02311, appendix B): of what all devices could do in that time."""
    peak = device.flops[candidate.parallel.precision] * candidate.world_size
    return model_flops(candidate) / (step_seconds * peak)
