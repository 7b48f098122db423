"""Which link carries a group, and how much of it."""

import pytest

from tpformer import ParallelConfig
from tpformer.planner.hardware import device, link
from tpformer.planner.network import group, path

H100, IB = device("h100-sxm"), link("ib-400")


def test_tp_is_innermost_and_pp_outermost() -> None:
    """As mesh.py lays the processes: neighbours on dp are tp apart, on pp tp x dp."""
    parallel = ParallelConfig(tp=4, pp=2, dp=8, dp_mode="hsdp", dp_shard=2)
    found = {axis: group(axis, parallel, 2) for axis in ("tp", "dp", "dp_shard", "dp_replicate", "pp", "world")}
    assert found == {
        "tp": (4, 1),
        "dp": (8, 4),
        "dp_shard": (2, 4),
        "dp_replicate": (4, 8),
        "pp": (2, 32),
        "world": (64, 1),
    }


def test_a_group_within_a_node_has_its_link() -> None:
    assert path(8, 1, H100, IB) == H100.link
    assert path(2, 4, H100, IB) == H100.link


@pytest.mark.parametrize(("stride", "members"), [(1, 8), (2, 4), (8, 1), (64, 1)])
def test_a_group_that_leaves_the_node_has_as_many_adapters_as_members(stride: int, members: int) -> None:
    between = path(16, stride, H100, IB)
    reached = between.bandwidth * between.efficiency
    assert reached == pytest.approx(min(members * 50e9 * IB.efficiency, H100.link.bandwidth * H100.link.efficiency))
    assert H100.link.latency < between.latency <= IB.latency


def test_a_ring_by_hand() -> None:
    """An all-reduce of 1 GB over 8 of 450 GB/s: 2 x 7/8 of it at the rate that is reached, 14 hops and a launch."""
    way = H100.link
    ring = 2 * 7 / 8 * 1e9 / (way.bandwidth * way.efficiency)
    expected = min(ring, 1e9 / way.in_switch) + 14 * way.latency + way.launch
    assert way.seconds("all_reduce", 10**9, 8) == pytest.approx(expected)
