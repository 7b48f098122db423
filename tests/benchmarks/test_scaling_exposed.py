"""Time in which communication stands in the way: what is known to be exposed, is; what is hidden, is not."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks.scaling_exposed import Stood, Wait, Waits, kernels_exposed, length, summarise
from benchmarks.scaling_jobs import Job
from benchmarks.scaling_presets import PRESETS
from benchmarks.scaling_steps import build_job
from tests.distributed import Ranks
from tpformer import trace_communication

LATE = 0.4  # seconds by which rank 1 comes late


def communicate(how: str) -> Stood:
    """On a rank: rank 1 sleeps, then both communicate."""
    x, rank = torch.ones(4), dist.get_rank()
    dist.barrier()
    with Waits() as waits:
        start = time.perf_counter()
        if rank == 1:
            time.sleep(LATE)
        if how == "all_reduce":
            dist.all_reduce(x)
        elif how == "functional":
            name = dist.group.WORLD.group_name  # type: ignore[union-attr]
            torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(x, "sum", name))
        elif how == "recv":
            dist.send(x, 0) if rank == 1 else dist.recv(x, 1)
        elif how == "hidden":  # rank 0 has as much to do meanwhile
            work = dist.all_reduce(x, async_op=True)
            time.sleep(0.0 if rank == 1 else LATE + 0.1)
            work.wait()
        seconds = time.perf_counter() - start
    return Stood(seconds, waits.issued, tuple(waits.waits))


def stood(rank: Stood) -> float:
    return sum(wait.end - wait.begin for wait in rank.waits)


@pytest.mark.parametrize("how", ["all_reduce", "functional", "recv"])
def test_a_late_rank_shows_on_the_other_as_exposed_and_idle(how: str, ranks: Ranks) -> None:
    first, second = ranks(communicate, 2, how)
    assert LATE - 0.05 < stood(first) <= first.seconds
    assert stood(second) < LATE / 2
    found = summarise([first, second], "tp")
    assert set(found["axes"]) == {"tp"}  # the job's axis: no mesh has named the group
    assert found["idle_share"] * found["step_seconds"] == pytest.approx(LATE / 2, abs=0.1)  # mean of the two
    assert found["compute_share"] + found["exposed_share"] == pytest.approx(1)


def test_what_is_hidden_behind_work_is_not_exposed(ranks: Ranks) -> None:
    """Negative control: the same lateness, but nobody waits."""
    first, _ = ranks(communicate, 2, "hidden")
    assert stood(first) < LATE / 4
    assert first.seconds > LATE


def trained(kind: str, axis: Any) -> tuple[list[str], list[str], list[str]]:
    """On a rank: what a step issues as the trace counts it, as the timer notes it, and what was waited for later."""
    built = build_job(Job(kind, axis, 2, PRESETS["cpu-tiny"].model, 4, 1 if axis == "pp" else 2), "cpu")
    built.step()  # a pipeline's first step greets its neighbours
    with trace_communication() as trace:
        built.step()
    with Waits() as waits:
        built.step()
    issuing = {wait.key for wait in waits.waits if wait.begin == waits.issued[wait.key]}
    later = [wait.key for wait in waits.waits if wait.begin != waits.issued[wait.key]]
    assert issuing == set(waits.issued)
    return [call.axis for call in trace.calls], [key.split()[0] for key in waits.issued], later


@pytest.mark.parametrize(
    ("kind", "axis"),
    [
        ("tpformer", "tp"),
        ("tpformer", "pp"),
        ("tpformer", "dp"),
        ("tpformer_fsdp", "dp"),
        ("dtensor", "tp"),
        ("fsdp2", "dp"),
    ],
)
def test_nothing_that_the_trace_knows_escapes_the_timer(kind: str, axis: str, ranks: Ranks) -> None:
    for calls, issued, later in ranks(trained, 2, kind, axis):
        assert sorted(calls) == sorted(issued) == [axis] * len(calls)
        assert len(calls) > 0
        assert len(set(later)) == len(calls)  # each was waited for


def test_waiting_ends_where_the_last_rank_comes() -> None:
    first = Stood(10.0, {"a": 1.0}, (Wait("a", "tp", 1.0, 6.0),))
    second = Stood(10.0, {"a": 4.0}, (Wait("a", "mesh", 4.0, 5.0),))
    found = summarise([first, second], "dp")
    assert found["axes"]["tp"] == {"seconds": 2.5, "share": 0.25, "waiting_share": 0.15}
    assert found["axes"]["dp"] == {"seconds": 0.5, "share": 0.05, "waiting_share": 0.0}
    assert found["idle_share"] == pytest.approx(0.15)
    assert found["compute_share"] == pytest.approx(0.7)


def kernel(name: str, start: float, duration: float, group: str = "") -> dict[str, object]:
    args = {"Process Group Description": group} if group else {}
    return {"cat": "kernel", "name": name, "ts": start, "dur": duration, "args": args}


def test_kernels_beside_which_nothing_runs_are_exposed() -> None:
    events = [
        kernel("gemm", 0, 100),
        kernel("ncclDevKernel_AllReduce", 80, 50, "mesh_tp"),  # 30 exposed
        kernel("ncclDevKernel_AllReduce", 150, 40, "mesh_dp"),  # 20 exposed, after 20 of nothing
        kernel("gemm", 170, 30),
        kernel("ncclDevKernel_SendRecv", 210, 10),  # nobody named its group: pp; after 10 of nothing
        {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 5000},
    ]
    seconds, exposed, idle = kernels_exposed(events, "pp")
    assert seconds == pytest.approx(220e-6)
    assert exposed == pytest.approx({"tp": 30e-6, "dp": 20e-6, "pp": 10e-6})
    assert idle == pytest.approx(30e-6)
    assert kernels_exposed([], "tp") == (0.0, {}, 0.0)


def test_length_counts_what_overlaps_once() -> None:
    assert length([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4
    assert length([]) == 0
