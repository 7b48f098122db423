"""What n ranks would take, from one rank's measured share and the network's figures; all that it makes says PROJECTED.

Each of the share's collectives adds what `Link.seconds` says. None is taken to be hidden behind computing, so that
where some are in truth (the gradients of replicas) a projection is an upper bound.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from benchmarks.scaling_exposed import breakdown
from tpformer.planner.machine import Link


def communication(calls: list[dict[str, Any]], ranks: int, link: Link) -> dict[str, float]:
    """Seconds of a rank's calls, as the worker's trace gives them, by axis. Raises ValueError as the link does."""
    found: dict[str, float] = defaultdict(float)
    for call in calls:
        found[call["axis"]] += call["calls"] * link.seconds(call["op"], call["bytes_each"], ranks)
    return dict(found)


def project(row: dict[str, Any], link: Link) -> dict[str, Any]:
    """A row of one rank's measured share, completed by the time of its communication. Raises ValueError as above."""
    by_axis = communication(row["communication"][0], row["degree"], link)
    added = 1e3 * sum(by_axis.values())
    times = {name: row[name] + added for name in ("median_ms", "p20_ms", "p80_ms")}
    projection = {"local_ms": row["median_ms"], "communication_ms": added, "network": link.name}
    return row | times | {"exposed": breakdown(times["median_ms"] / 1e3, by_axis, {}), "projection": projection}


def network_line(network: dict[str, Any]) -> str:
    """The figures that a projection stands on, of a link as plain values."""
    switch = f", sums in switches {network['in_switch'] / 1e9:g} GB/s" if network["in_switch"] else ""
    return (
        f"PROJECTED with {network['name']}: {network['bandwidth'] / 1e9:g} GB/s each way x {network['efficiency']:g}, "
        f"{1e6 * network['latency']:g} µs a hop, {1e6 * network['launch']:g} µs a call{switch} ({network['source']})"
    )
