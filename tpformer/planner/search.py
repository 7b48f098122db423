"""The layouts of a model on so many devices, without those that do not fit, by predicted step time."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

from tpformer.parallel_config import Overlap, ParallelConfig, Precision
from tpformer.planner.candidate import Candidate, ModelConfig
from tpformer.planner.cost import Machine, StepTime, mfu, rank_times, step_time
from tpformer.planner.hardware import device, link
from tpformer.planner.known_models import known_model
from tpformer.planner.machine import Device, Link
from tpformer.planner.memory import Memory, memory
from tpformer.planner.traffic import Traffic, traffic

RESERVED = 0.08
"""Share of a device's memory that is left to its runtime, NCCL and the allocator's gaps."""
PIPELINES = (("1f1b", 0), ("interleaved_1f1b", 2), ("interleaved_1f1b", 4), ("interleaved_zero_bubble", 2), ("zbv", 0))
RECOMPUTE: tuple[dict[str, Any], ...] = (
    {},
    {"recompute": "selective", "recompute_modules": ("mlp",)},
    {"recompute": "full"},
)
"""From the fastest on: what fits without is not tried with."""


@dataclass(frozen=True)
class Plan:
    """A layout with its predicted memory, traffic, bubble and time."""

    candidate: Candidate
    machine: Machine
    memory: Memory
    """Of the rank that needs most."""
    traffic: tuple[Traffic, ...]
    """Of the rank that computes longest, in one step."""
    time: StepTime

    @property
    def seconds(self) -> float:
        """Of a step."""
        return self.time.total

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation."""
        return mfu(self.candidate, self.seconds, self.machine.device)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together."""
        return self.candidate.batch_size * self.candidate.seq_len / self.seconds

    @property
    def bubble(self) -> float:
        """Share of the step that the busiest rank waits for the pipeline to fill and drain."""
        return self.time.of("bubble") / self.seconds


@dataclass(frozen=True)
class Search:
    """What is asked for."""

    model: ModelConfig
    gpus: int
    machine: Machine
    tokens_per_step: int
    seq_len: int
    precision: Precision = "bf16"
    overlap: Overlap = "auto"

    def __post_init__(self) -> None:
        for name in ("gpus", "tokens_per_step", "seq_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least 1")
        if self.seq_len > self.model.max_seq_len:
            raise ValueError(f"seq_len ({self.seq_len}) must be at most max_seq_len ({self.model.max_seq_len})")

    @cached_property
    def batch_size(self) -> int:
        """Samples of a step: as many whole sequences as the tokens make, at least one."""
        return max(1, round(self.tokens_per_step / self.seq_len))

    @property
    def on_cpu(self) -> bool:
        """Whether processes without GPUs run it."""
        return self.machine.device.name.startswith("cpu")


def plan(
    model: str | ModelConfig,
    gpus: int,
    device_name: str | Device,
    tokens_per_step: int,
    *,
    network: str | Link = "ib-400",
    seq_len: int = 0,
    precision: Precision = "bf16",
) -> list[Plan]:
    """The layouts that are tried (`layouts`, RECOMPUTE, PIPELINES) and fit, the fastest predicted first.

    model: a known name (llama-70b) or a config; device_name: a name of the hardware table, or a calibrated machine's
    JSON file; seq_len 0: 8192, or max_seq_len where that is less.
    Raises ValueError for unknown names, and where nothing fits, with what the smallest layout would take.
    """
    config = known_model(model) if isinstance(model, str) else model
    place = device(device_name) if isinstance(device_name, str) else device_name
    between = link(network) if isinstance(network, str) else network
    length = seq_len or min(8192, config.max_seq_len)
    return run(Search(config, gpus, Machine(place, between), tokens_per_step, length, precision))


def run(search: Search) -> list[Plan]:
    """Every layout that fits, the fastest first. Raises ValueError as `plan` does."""
    room = search.machine.device.memory * (1 - RESERVED)
    smallest: list[tuple[int, Candidate]] = []
    plans = [found for options in layouts(search) for found in _that_fit(search, options, room, smallest)]
    if not plans:
        raise ValueError(_nothing_fits(search, room, smallest))
    return sorted(plans, key=lambda found: found.seconds)


def layouts(search: Search) -> Iterator[dict[str, Any]]:
    """Fields of ParallelConfig: degrees, sequence parallelism, schedule and data-parallel mode; tp within a node."""
    per_node = search.machine.device.per_node
    degrees = [n for n in range(1, search.gpus + 1) if search.gpus % n == 0]
    for tp, pp in product(degrees, repeat=2):
        dp, rest = divmod(search.gpus, tp * pp)
        inside = tp <= per_node and (per_node % tp == 0 or search.gpus <= per_node or search.on_cpu)
        if not inside or pp > search.model.num_layers or rest or search.batch_size % dp:
            continue
        modes: list[dict[str, Any]] = [{"dp_mode": "replicate"}]
        if dp > 1:
            modes.append({"dp_mode": "zero2"})
        if dp > 1 and pp == 1:  # a pipeline keeps what it gathered for the step, in fsdp as in zero2
            modes.append({"dp_mode": "fsdp"})
            shard = per_node // tp
            modes += [{"dp_mode": "hsdp", "dp_shard": shard}] * (1 < shard < dp and dp % shard == 0)
        pipelines = PIPELINES if pp > 1 else PIPELINES[:1]
        for (schedule, stages), mode, sp in product(pipelines, modes, (True, False) if tp > 1 else (False,)):
            pipeline = {"pp": pp, "pp_schedule": schedule, "stages_per_rank": stages}
            yield {"tp": tp, "dp": dp, "sequence_parallel": sp} | pipeline | mode


def _that_fit(
    search: Search, options: dict[str, Any], room: float, smallest: list[tuple[int, Candidate]]
) -> Iterator[Plan]:
    """One layout with each micro-batch size and the least recomputation with which it fits.

    What needs least is left in `smallest`.
    """
    samples = search.batch_size // options["dp"]
    sizes = [n for n in range(1, samples + 1) if samples % n == 0]
    for recompute in RECOMPUTE:
        parallel = ParallelConfig(precision=search.precision, **options, **recompute)
        for size in list(sizes):
            try:
                candidate = Candidate(search.model, parallel, search.seq_len, search.batch_size, size, search.on_cpu)
                needed = worst_memory(candidate, room)
            except ValueError:  # it does not divide, or the schedule does not run so many micro-batches
                continue
            if not smallest or needed.total < smallest[0][0]:
                smallest[:] = [(needed.total, candidate)]
            if needed.total > room:
                break  # larger ones need more
            sizes.remove(size)
            yield planned(candidate, search.machine, needed)


def worst_memory(candidate: Candidate, room: float = float("inf")) -> Memory:
    """Of the rank that needs most, or of the first one found that needs more than `room`."""
    worst: Memory | None = None
    for rank, _ in candidate.rank_kinds:
        needed = memory(candidate, rank)
        if worst is None or needed.total > worst.total:
            worst = needed
        if worst.total > room:
            break
    assert worst is not None
    return worst


def planned(candidate: Candidate, machine: Machine, needed: Memory | None = None) -> Plan:
    """What one layout takes, whether it fits or not."""
    times = rank_times(candidate, machine)
    busiest = max(times, key=lambda time: time.all)
    sent = traffic(candidate, busiest.rank)
    return Plan(candidate, machine, needed or worst_memory(candidate), sent, step_time(candidate, times, sent, machine))


def _nothing_fits(search: Search, room: float, smallest: list[tuple[int, Candidate]]) -> str:
    what = (
        f"on {search.gpus} x {search.machine.device.name} with {search.batch_size} samples of {search.seq_len} tokens"
    )
    if not smallest:
        return (
            f"no layout divides {what}: tp must divide the {search.model.num_heads} heads, and dp the samples; "
            "change tokens_per_step or gpus"
        )
    needed, candidate = smallest[0]
    p = candidate.parallel
    return (
        f"nothing fits {what}: the smallest found, tp {p.tp} x pp {p.pp} x dp {p.dp} {p.dp_mode}, needs "
        f"{needed / 2**30:.1f} GiB of {room / 2**30:.1f} on a device; take more devices"
    )
