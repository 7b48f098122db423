"""What devices and networks can do, each figure with its source."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """A way between devices: what one device can send while it receives as much."""

    name: str
    bandwidth: float
    """Bytes a second, one direction, of one device."""
    latency: float
    """Seconds of one hop."""
    source: str
    efficiency: float = 1.0
    """Share of the bandwidth that large collectives reach."""


@dataclass(frozen=True)
class Device:
    """One GPU, or one CPU process, with its neighbours' link."""

    name: str
    flops: dict[str, float]
    """Dense matmul FLOP/s at most, by precision: fp32, bf16, fp16."""
    memory: float
    """Bytes."""
    bandwidth: float
    """Of its memory, bytes a second."""
    per_node: int
    """Devices that the link joins: a node; of a CPU, its cores."""
    link: Link
    """Between the devices of a node."""
    source: str
    matmul_efficiency: float = 1.0
    """Share of flops that large matmuls reach."""
    bandwidth_efficiency: float = 1.0
    """Share of the memory's bandwidth that pointwise operators reach."""
    overhead: float = 0.0
    """Seconds of a block's forward and backward that no size changes (a CPU's operators one by one)."""
