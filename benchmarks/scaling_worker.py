"""One rank of a job of benchmarks.scaling: builds its model, then does what the parent asks, and sleeps in between.

Started by torchrun with one argument: JSON of the parent's store, the job's name there, and the job.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness, step_trace
from benchmarks.scaling_exposed import Stood, Waits, kernels_exposed
from benchmarks.scaling_jobs import Job
from benchmarks.scaling_steps import Built, build_job
from tpformer import trace_communication
from tpformer.train.log import peak_flops

Answer = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where a worker meets its parent."""

    port: int
    name: str
    """Of the job, before every key."""
    device: str | None
    threads: int
    job: Job

    @classmethod
    def from_json(cls, text: str) -> Place:
        """What the parent gave."""
        fields = json.loads(text)
        return cls(**fields | {"job": Job.from_json(fields["job"])})


def start_together(built: Built) -> None:
    """All ranks of the job set out at the same time."""
    harness.synchronize(built.mesh.device)
    if built.mesh.world.size > 1:
        dist.barrier()


def facts(job: Job, built: Built) -> Answer:
    """What of the job is no measurement."""
    device = built.mesh.device
    return {
        "gemm_backend": built.gemm_backend,
        "peak_flops": peak_flops(device),
        "backend": dist.get_backend() if dist.is_initialized() else None,
    }


def check(job: Job, built: Built) -> Answer:
    """An untimed step: this rank's share of the loss, and the first norm's gradient where it is."""
    loss = float(built.step())
    gradient = built.first_norm()
    return {"loss": loss, "first_norm": None if gradient is None else gradient.float().tolist()}


def step(job: Job, built: Built) -> Answer:
    """A timed step."""
    start_together(built)
    own, start = harness.own_busy_seconds(), time.perf_counter()
    built.step()
    harness.synchronize(built.mesh.device)
    return {"seconds": time.perf_counter() - start, "own": harness.own_busy_seconds() - own}


def trace(job: Job, built: Built) -> Answer:
    """A step's communication, by operation, axis and dtype."""
    with trace_communication() as seen:
        built.step()
    calls: Counter[tuple[str, str, str, int]] = Counter()
    for call in seen.calls:
        axis = call.axis if call.axis in ("tp", "pp", "dp") else job.axis  # whom no mesh has named
        calls[call.op, axis, call.dtype, call.bytes] += 1
    names = ("op", "axis", "dtype", "bytes_each", "calls")
    return {"communication": [dict(zip(names, (*key, count), strict=True)) for key, count in calls.items()]}


def exposed(job: Job, built: Built) -> Answer:
    """A step in which it is noted what stood still for communication."""
    if built.mesh.device.type == "cuda":
        return kernels(job, built)
    start_together(built)
    with Waits() as waits:
        start = time.perf_counter()
        built.step()
        seconds = time.perf_counter() - start
    return {"stood": Stood(seconds, waits.issued, tuple(waits.waits)).to_plain()}


def kernels(job: Job, built: Built) -> Answer:
    """The same, by torch.profiler."""
    start_together(built)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        built.step()
        harness.synchronize(built.mesh.device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        seconds, axes, idle = kernels_exposed(step_trace.read(path), job.axis)
    return {"kernels": {"seconds": seconds, "exposed": axes, "idle": idle}}


def memory(job: Job, built: Built) -> Answer:
    """Peak bytes of a step; those before it have made the lasting buffers."""
    device = built.mesh.device
    harness.release_memory(device)
    harness.reset_peak_memory(device)
    built.step()
    harness.synchronize(device)
    return {"peak_bytes": harness.peak_memory(device)}


TASKS: dict[str, Callable[[Job, Built], Answer]] = {
    "facts": facts,
    "check": check,
    "step": step,
    "trace": trace,
    "exposed": exposed,
    "memory": memory,
}


def serve(place: Place, store: dist.Store, rank: int) -> None:
    """Build, then answer until asked to end."""
    torch.set_num_threads(place.threads)
    built = build_job(place.job, place.device)
    number = 0
    while True:
        asked = store.get(f"{place.name}/ask/{number}").decode()  # blocks until it is there
        if asked == "end":
            break
        answer = TASKS[asked](place.job, built)
        store.set(f"{place.name}/answer/{number}/{rank}", json.dumps(answer))
        number += 1
    built.mesh.close()


def main() -> None:
    """What one process does."""
    place, rank = Place.from_json(sys.argv[1]), int(os.environ["RANK"])
    store = dist.TCPStore("127.0.0.1", place.port, is_master=False, wait_for_workers=False, timeout=timedelta(days=1))
    store.set(f"{place.name}/pid/{rank}", str(os.getpid()))
    try:
        serve(place, store, rank)
    except BaseException as error:
        with contextlib.suppress(dist.DistError):  # the parent is gone
            store_error(store, place, error)
        raise


def store_error(store: dist.Store, place: Place, error: BaseException) -> None:
    """Tell the parent, in one line; the first rank's counts."""
    line = (str(error).strip().splitlines() or [""])[0]
    store.compare_set(f"{place.name}/error", "", f"{type(error).__name__}: {line}"[:300])


if __name__ == "__main__":
    main()
