"""A device and the link to its neighbours, in plain figures with their sources: what the planner counts with."""

import json
from dataclasses import asdict, dataclass, field

SCHEMA = 1  # of a machine's file


@dataclass(frozen=True)
class Timing:
    """What a collective was measured to take: seconds = latency + bytes / bandwidth."""

    op: str
    """all_reduce, all_gather, reduce_scatter, or send: one message, from its send to the end of its receive."""
    ranks: int
    latency: float
    """Seconds of an empty one."""
    bandwidth: float
    """Bytes a second of the unsharded side, as the trace counts it."""


@dataclass(frozen=True)
class Link:
    """A way between devices: what one device can send while it receives as much."""

    name: str
    bandwidth: float
    """Bytes a second, one direction, of one device."""
    latency: float
    """Seconds of one hop."""
    source: str
    """Of the bandwidth, and of what `sources` does not name."""
    efficiency: float = 1.0
    """Share of the bandwidth that large collectives reach."""
    launch: float = 0.0
    """Seconds of every collective beside its hops."""
    in_switch: float = 0.0
    """Bytes a second of an all-reduce that the switches sum, whatever its ranks; 0 where they cannot."""
    measured: tuple[Timing, ...] = ()
    """Takes the place of all the figures above."""
    sources: dict[str, str] = field(default_factory=dict)
    """Of single figures, by their names."""

    def seconds(self, op: str, size: int, ranks: int) -> float:
        """Of one collective among neighbours; size: bytes of its unsharded side.

        A ring: 2 (n - 1) hops and 2 (n - 1) / n of the bytes for an all_reduce, half of both for an all_gather or a
        reduce_scatter, one hop and all bytes for a send (Thakur et al. 2005); or the measured timing of the nearest
        number of ranks. Raises ValueError for another op.
        """
        if op not in ("all_reduce", "all_gather", "reduce_scatter", "send"):
            raise ValueError(f"op ({op!r}) must be all_reduce, all_gather, reduce_scatter or send")
        if ranks == 1:
            return 0.0
        timings = [timing for timing in self.measured if timing.op == op]
        if timings:
            nearest = min(timings, key=lambda timing: abs(timing.ranks - ranks))
            return nearest.latency + size / nearest.bandwidth
        if op == "send":
            return self.launch + self.latency + size / (self.bandwidth * self.efficiency)
        rounds = (2 if op == "all_reduce" else 1) * (ranks - 1)
        ring = rounds * size / ranks / (self.bandwidth * self.efficiency)
        if op == "all_reduce" and self.in_switch:
            ring = min(ring, size / self.in_switch)
        return self.launch + rounds * self.latency + ring


@dataclass(frozen=True)
class Device:
    """One GPU, or one CPU process, with its neighbours' link."""

    name: str
    flops: dict[str, float]
    """Dense matmul FLOP/s at most, by precision: fp32, bf16, fp16."""
    memory: float
    """Bytes. Of data sheets' GB, 10^9 each: up to 7 % less than drivers report, which CUDA and NCCL use themselves."""
    bandwidth: float
    """Of its memory, bytes a second."""
    per_node: int
    """Devices that the link joins: a node; of a CPU, its cores."""
    link: Link
    """Between the devices of a node."""
    source: str
    """Of flops, memory and bandwidth, and of what `sources` does not name."""
    matmul_efficiency: float = 1.0
    """Share of flops that large matmuls reach."""
    bandwidth_efficiency: float = 1.0
    """Share of the memory's bandwidth that pointwise operators reach."""
    overhead: float = 0.0
    """Seconds of a block's forward and backward that no size changes (a CPU's operators one by one)."""
    sources: dict[str, str] = field(default_factory=dict)
    """Of single figures, by their names."""

    def peak(self, precision: str) -> float:
        """Dense matmul FLOP/s at most. Raises ValueError for a precision without matmul units."""
        if precision not in self.flops:
            raise ValueError(f"{self.name} has no {precision} matmul rate, only {' and '.join(self.flops)}")
        return self.flops[precision]

    def to_json(self) -> str:
        """All of it; from_json gives an equal one."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> "Device":
        """What to_json wrote. Raises ValueError for other text."""
        try:
            fields = json.loads(text)
            if fields.pop("schema") != SCHEMA:
                raise ValueError(f"schema must be {SCHEMA}")
            link = fields.pop("link")
            timings = tuple(Timing(**timing) for timing in link.pop("measured"))
            return Device(**fields, link=Link(**link, measured=timings))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a device as `tpformer calibrate` writes it: {error!r}") from None
