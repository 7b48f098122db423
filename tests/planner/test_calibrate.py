"""What a calibration says of this machine is what a fresh measurement finds, and its file keeps it."""

import statistics
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.distributed import Ranks
from tpformer.planner.calibrate import OPS, SIZES, Run, _collective, _run, calibrate, collective
from tpformer.planner.hardware import device
from tpformer.planner.machine import Device, Link, Timing
from tpformer.planner.operators import (
    BLOCKS,
    HEAD,
    TOKENS,
    Rates,
    block_total,
    head_total,
    measurements,
    model,
    shapes,
    tiny,
)
from tpformer.trace import trace_communication

BYTES = 2**23


@pytest.fixture(scope="module")
def machine(ranks: Ranks) -> Device:
    """Asks for `ranks`, whose processes have the modules loaded that the calibration's need."""
    assert ranks
    return calibrate(seconds=2, processes=2)


def test_its_figures_are_a_machines(machine: Device) -> None:
    assert set(machine.flops) == {"fp32", "bf16"}
    assert all(1e9 < rate < 1e13 for rate in machine.flops.values())
    assert 1e8 < machine.bandwidth < 1e12
    assert 1e-5 < machine.overhead < 0.1
    assert 0.01 < machine.attention_efficiency <= 1
    assert 1e8 < machine.memory * machine.per_node < 1e14
    assert [(timing.op, timing.ranks) for timing in machine.link.measured] == [(op, 2) for op in OPS]
    for timing in machine.link.measured:
        assert 0 <= timing.latency < 0.1
        assert 1e7 < timing.bandwidth < 1e12


def test_its_file_keeps_every_figure(machine: Device, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(machine.to_json())
    assert device(str(path)) == machine


def everyone() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def _all_reduce_seconds() -> float:
    """As a step meets it: after work that takes one rank longer than the other."""
    return _collective("all_reduce", BYTES, 2, everyone(), budget=0.5)


def test_an_all_reduce_takes_what_the_link_says(machine: Device, ranks: Ranks) -> None:
    measured = statistics.mean(ranks(_all_reduce_seconds, 2))
    assert machine.link.seconds("all_reduce", BYTES, 2) == pytest.approx(measured, rel=0.5)


def test_matmuls_run_at_the_rate_that_it_says(machine: Device) -> None:
    a, b = torch.randn(TOKENS, 512), torch.randn(512, 512)
    torch.mm(a, b)
    start = time.process_time()
    for _ in range(50):
        torch.mm(a, b)
    rate = 50 * 2 * TOKENS * 512 * 512 / (time.process_time() - start)
    assert rate / 3 < machine.flops["fp32"] < rate * 3  # oneDNN is up to 2.2 times as fast as MKL


def _traced(op: str) -> list[int]:
    call = collective(op, SIZES[0], 2, everyone())
    with trace_communication() as trace:
        call()
    return [one.bytes for one in trace.calls]


@pytest.mark.parametrize(("op", "calls"), [("all_reduce", 1), ("all_gather", 1), ("reduce_scatter", 1), ("send", 2)])
def test_what_is_timed_is_the_bytes_that_the_trace_counts(ranks: Ranks, op: str, calls: int) -> None:
    assert ranks(_traced, 2, op) == [[SIZES[0]] * calls] * 2


def test_odd_ranks_send_in_pairs(ranks: Ranks) -> None:
    assert ranks(_send_of_three, 3) == [True] * 3


def _send_of_three() -> bool:
    collective("send", SIZES[0], 3, everyone())()
    return True


def made_up(bandwidth: float, overhead: float) -> dict[str, float]:
    """Seconds of every measurement on a machine of 50 GFLOP/s, 100 in bf16, half of it in attention."""
    products = sum(6 * TOKENS * a * b for a, b in shapes())
    seconds = {"matmul fp32": products / 50e9, "matmul bf16": products / 100e9, "tiny block": overhead}
    seconds["attention"] = 3.5 * 2 * 512 * 512 * 8 * 64 / 25e9
    for hidden in BLOCKS:
        work = block_total(model(hidden))
        seconds[f"block {hidden}"] = overhead + work.matmul / 50e9 + work.attention / 25e9 + work.bytes / bandwidth
    work = head_total(model(*HEAD))
    seconds["head"] = work.matmul / 50e9 + work.bytes / bandwidth
    return seconds


def test_rates_are_those_of_a_made_up_machine() -> None:
    rates = Rates.of(made_up(bandwidth=7e9, overhead=1e-3))
    assert rates.flops == pytest.approx({"fp32": 50e9, "bf16": 100e9})
    assert rates.attention_efficiency == pytest.approx(0.5)
    assert rates.bandwidth == pytest.approx(7e9)
    assert rates.overhead == 1e-3
    assert {one.name for one in measurements()} == made_up(7e9, 1e-3).keys()


def test_blocks_that_leave_no_time_for_bytes_give_a_rate_all_the_same() -> None:
    seconds = made_up(bandwidth=7e9, overhead=1e-3)
    for name in seconds:
        if name.startswith(("block", "head")):
            seconds[name] *= 0.5
    assert 7e9 < Rates.of(seconds).bandwidth < 1e13


def test_a_tiny_block_has_next_to_no_work() -> None:
    assert tiny().max_seq_len * tiny().hidden_size < 0.01 * TOKENS * BLOCKS[0]


@pytest.mark.parametrize(("seconds", "processes"), [(0, 2), (-1, 2), (float("nan"), 2), (1, 1)])
def test_numbers_out_of_range_are_refused(seconds: float, processes: int) -> None:
    with pytest.raises(
        ValueError, match=rf"seconds \({seconds}\) must be above 0 and processes \({processes}\) at least 2"
    ):
        calibrate(seconds, processes)


def test_a_machine_with_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="calibrate measures machines without GPUs"):
        calibrate(1)


def test_a_wrong_line_through_the_sizes_is_seen(machine: Device) -> None:
    """Negative control: with a bandwidth of twice the measured, the check of 8 MiB above fails."""
    timing = next(one for one in machine.link.measured if one.op == "all_reduce")
    fast = Link("fast", 1, 1, "a test", measured=(Timing("all_reduce", 2, timing.latency / 3, 3 * timing.bandwidth),))
    assert fast.seconds("all_reduce", BYTES, 2) != pytest.approx(machine.link.seconds("all_reduce", BYTES, 2), rel=0.5)


def test_a_process_that_fails_ends_it_with_its_error() -> None:
    """A group of two among one process cannot be."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(RuntimeError, match=r"a process of the calibration failed(.|\n)*world"):
        _run(Run(store.port, world_size=1, cores=1, groups=(2,), seconds=0.01))
