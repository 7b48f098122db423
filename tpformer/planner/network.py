"""Which ranks an axis joins, and by what: the node's link, or the network with the adapters that they have."""

from dataclasses import replace

from tpformer.parallel_config import ParallelConfig
from tpformer.planner.machine import Device, Link


def group(axis: str, parallel: ParallelConfig, shards: int) -> tuple[int, int]:
    """How many ranks an axis has, and how far apart two neighbours on it are; tp is innermost, pp outermost."""
    tp, dp, pp = parallel.tp, parallel.dp or 1, parallel.pp
    return {
        "tp": (tp, 1),
        "dp": (dp, tp),
        "dp_shard": (shards, tp),
        "dp_replicate": (dp // shards, tp * shards),
        "pp": (pp, tp * dp),
        "world": (tp * dp * pp, 1),
    }[axis]


def path(size: int, stride: int, device: Device, network: Link) -> Link:
    """What joins a group of `size` ranks, `stride` apart.

    A node's members of a group that leaves it send by their own adapters at once, as far as the node's link carries
    it, and most hops of a ring stay in the node.
    """
    members = max(1, device.per_node // stride)
    if size <= members:
        return device.link
    inside = device.link.bandwidth * device.link.efficiency / network.efficiency
    hop = (network.latency + (members - 1) * device.link.latency) / members
    return replace(network, bandwidth=min(inside, members * network.bandwidth), latency=hop)
