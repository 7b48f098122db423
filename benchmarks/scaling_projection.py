"""What n ranks would take, from one rank's measured share and the network's figures; everything it makes says PROJECTED.

A collective is taken to cost what a ring costs (Patarasuk and Yuan 2009): each rank sends a share of the payload in
n - 1 steps, an all-reduce twice that. Nothing is taken to be hidden behind computing, so that what is hidden in truth
(the gradients of replicas) makes the projection an upper bound.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from typing import Any

from tpformer.planner.hardware import Link

ROUNDS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}
"""How often a ring turns: n - 1 steps each, in which a rank sends an n-th of the payload."""


def seconds(op: str, payload: int, ranks: int, link: Link) -> float:
    """One collective's time; payload in bytes of the unsharded side. Raises ValueError for one that is no ring's."""
    if op not in ROUNDS:
        raise ValueError(f"{op} has no ring: only {', '.join(ROUNDS)} can be projected")
    steps = ROUNDS[op] * (ranks - 1)
    return steps * (payload / ranks / (link.bandwidth * link.efficiency) + link.latency)


def communication(calls: list[dict[str, Any]], ranks: int, link: Link) -> dict[str, float]:
    """Seconds of a rank's calls by axis; a call is what the worker's trace gives."""
    found: dict[str, float] = defaultdict(float)
    for call in calls:
        found[call["axis"]] += call["calls"] * seconds(call["op"], call["bytes_each"], ranks, link)
    return dict(found)


def project(row: dict[str, Any], link: Link) -> dict[str, Any]:
    """A row of one rank's measured share, completed by the time of its communication."""
    by_axis = communication(row["communication"][0], row["degree"], link)
    added = sum(by_axis.values())
    times = {name: row[name] + 1e3 * added for name in ("median_ms", "p20_ms", "p80_ms")}
    step = times["median_ms"] / 1e3
    exposed = {
        "step_seconds": step,
        "compute_share": 1 - added / step,
        "axes": {axis: {"seconds": s, "share": s / step, "waiting_share": 0.0} for axis, s in by_axis.items()},
        "exposed_share": added / step,
        "idle_share": 0.0,
    }
    measured = {"local_ms": row["median_ms"], "communication_ms": 1e3 * added, "network": asdict(link)}
    return row | times | {"exposed": exposed, "projection": measured}


def network_line(link: Link) -> str:
    """The figures that a projection stands on."""
    return (
        f"PROJECTED with {link.name}: {link.bandwidth / 1e9:g} GB/s each way x {link.efficiency:g}, "
        f"{1e6 * link.latency:g} µs a hop ({link.source})"
    )
