"""`tpformer calibrate`: what this CPU machine can do, measured in processes of its own, as the planner counts it."""

import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from tqdm import tqdm

from tpformer.planner.machine import Device, Link, Timing
from tpformer.planner.operators import Measurement, Rates, measurements

SIZES = (2**12, 2**18, 2**20, 2**22, 2**24)
"""Bytes of the collectives that are timed."""
OPS = ("all_reduce", "all_gather", "reduce_scatter", "send")
COLLECTIVES = 0.4
"""Share of the seconds that they get."""


@dataclass(frozen=True)
class Run:
    """What every process is told."""

    port: int
    world_size: int
    cores: int
    groups: tuple[int, ...]
    """Numbers of ranks that collectives are timed among."""
    seconds: float


def calibrate(seconds: float = 20.0, processes: int = 2) -> Device:
    """Measure this machine for about so many seconds, once its processes have started: a device for the planner.

    Operators run on all cores at once, one process a core, for ranks do; collectives among `processes` ranks, and
    among 4 if there is time. Raises ValueError for numbers out of range and where there is a GPU, RuntimeError if a
    process fails.
    """
    if torch.cuda.is_available():
        raise ValueError("calibrate measures machines without GPUs; for this one's, see tpformer plan --list-hardware")
    if not seconds > 0 or processes < 2:
        raise ValueError(f"seconds ({seconds}) must be above 0 and processes ({processes}) at least 2")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    groups = (processes, 4) if seconds >= 15 and processes < 4 else (processes,)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = _run(Run(store.port, max(cores, *groups), cores, groups, seconds))
    return _device(found, cores, seconds)


def _run(run: Run) -> dict[str, Any]:
    """Start the processes, show how far they are, and return what they measured."""
    steps = len(measurements()) + len(run.groups) * len(OPS)
    queue = mp.get_context("forkserver").SimpleQueue()
    deadline = time.monotonic() + 10 * run.seconds + 120
    context = mp.start_processes(_work, (run, queue), run.world_size, join=False, start_method="forkserver")
    found: dict[str, Any] = {}
    try:
        with tqdm(total=steps, desc="calibrate", leave=False) as bar:
            while not context.join(timeout=0.05):
                while not queue.empty():
                    found.update(queue.get())
                    bar.update()
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the processes have not ended after {10 * run.seconds + 120:.0f} s")
        while not queue.empty():
            found.update(queue.get())
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        raise RuntimeError(f"a process of the calibration failed: {error}") from None
    finally:
        for process in context.processes:
            process.kill()
    return found


def _work(rank: int, run: Run, queue: Any) -> None:
    """A process's life: every measurement with the others, and rank 0 reports the mean over those that took part."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    store = dist.TCPStore("127.0.0.1", run.port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=run.world_size)
    for measurement in measurements():
        _report(queue, measurement.name, _operator(rank, run, measurement))
    for ranks in run.groups:
        group = dist.new_group(list(range(ranks)))
        for op in OPS:
            dist.barrier()
            timing = _timing(op, ranks, group, run) if rank < ranks else None
            _report(queue, f"{op} {ranks}", timing)
    dist.barrier()
    dist.destroy_process_group()


def _report(queue: Any, name: str, value: Any) -> None:
    if dist.get_rank() == 0:
        queue.put({name: value})


def _operator(rank: int, run: Run, measurement: Measurement) -> float:
    """Seconds of one call, the mean over as many processes as there are cores, which all run it at once."""
    call = measurement.prepare()
    dist.barrier()
    budget = run.seconds * (1 - COLLECTIVES) / len(measurements())
    spent = torch.tensor(_seconds(call, budget) if rank < run.cores else 0.0, dtype=torch.float64)
    dist.all_reduce(spent)
    return spent.item() / min(run.cores, run.world_size)


def _seconds(call: Callable[[], object], budget: float) -> float:
    """Of one call after an untimed one, by this process's own clock: it stands still while others run."""
    call()
    spent: list[float] = []
    end = time.perf_counter() + budget
    while len(spent) < 3 or time.perf_counter() < end:
        start = time.process_time()
        call()
        spent.append(time.process_time() - start)
    return statistics.median(spent)


def _timing(op: str, ranks: int, group: dist.ProcessGroup, run: Run) -> Timing:
    """The line through a collective's seconds at all sizes that has the least relative errors."""
    budget = run.seconds * COLLECTIVES / len(run.groups) / len(OPS) / len(SIZES)
    spent = [_collective(op, size, ranks, group, budget) for size in SIZES]
    inverse = 1 / torch.tensor(spent, dtype=torch.float64)
    columns = torch.stack([inverse, inverse * torch.tensor(SIZES, dtype=torch.float64)], dim=1)
    latency, slope = torch.linalg.lstsq(columns, torch.ones(len(SIZES), 1, dtype=torch.float64)).solution[:, 0].tolist()
    if latency <= 0:  # the smallest was no slower than its share of the largest
        latency, slope = 0.0, spent[-1] / SIZES[-1]
    return Timing(op, ranks, latency, 1 / max(slope, 1e-15))


def _collective(op: str, size: int, ranks: int, group: dist.ProcessGroup, budget: float) -> float:
    """Seconds of one, the mean over the ranks, which multiply before each as long as a layer does: in a step, too,
    they come to it apart, and with caches full of other numbers."""
    call = collective(op, size, ranks, group)
    a = torch.randn(640, 640)
    start = time.perf_counter()
    _one(call, a)
    trial = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
    dist.all_reduce(trial, op=dist.ReduceOp.MAX, group=group)  # every rank is to time as many
    count = min(max(7, math.ceil(budget / trial.item())), 200)
    spent = torch.tensor(statistics.median(_one(call, a) for _ in range(count)), dtype=torch.float64)
    dist.all_reduce(spent, group=group)
    return spent.item() / ranks / (2 if op == "send" else 1)


def _one(call: Callable[[], object], a: Tensor) -> float:
    torch.mm(a, a)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def collective(op: str, size: int, ranks: int, group: dist.ProcessGroup) -> Callable[[], object]:
    """A call of one with so many bytes on the unsharded side; of a send, there and back between pairs of ranks."""
    whole = torch.ones(size // 4 // ranks * ranks)
    part = torch.ones(whole.numel() // ranks)
    if op == "all_reduce":
        return lambda: dist.all_reduce(whole, group=group)
    if op == "all_gather":
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.13 renamed them
        return lambda: gather(whole, part, group=group)
    if op == "reduce_scatter":
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        return lambda: scatter(part, whole, group=group)
    rank = dist.get_rank(group)
    if ranks % 2 and rank == ranks - 1:
        return lambda: None
    ways = (dist.send, dist.recv) if rank % 2 == 0 else (dist.recv, dist.send)
    return lambda: [way(whole, rank ^ 1, group=group) for way in ways]


def _device(found: dict[str, Any], cores: int, seconds: float) -> Device:
    """What was measured, in the planner's terms."""
    rates = Rates.of(found)
    timings = tuple(value for value in found.values() if isinstance(value, Timing))
    send = next(timing for timing in timings if timing.op == "send")
    source = f"measured in {seconds:g} s by tpformer calibrate, torch {torch.__version__}, {platform.machine()}"
    return Device(
        name=f"cpu, {cores} cores",
        flops=rates.flops,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / cores,
        bandwidth=rates.bandwidth,
        per_node=cores,
        link=Link("gloo", send.bandwidth, send.latency, source, measured=timings),
        source=source,
        attention_efficiency=rates.attention_efficiency,
        overhead=rates.overhead,
    )
