"""Times the work of one device: CUDA graphs or events on a GPU, the wall clock elsewhere; contenders in turn.

On CUDA everything, the forward passes of what is timed included, belongs inside `own_stream`: a graph cannot be
captured on the default stream, and autograd runs a backward on the stream of its forward.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import harness

Call = Callable[[], object]

GRAPH_BELOW = 1e-3  # seconds of a call: shorter ones are replayed from a CUDA graph, without gaps between launches
SAMPLE = 2e-3  # seconds that one sample of such calls lasts, about


@dataclass(frozen=True)
class Work:
    """What is timed: every call does the same to another set of tensors; `prepare`, before each, is not timed."""

    calls: tuple[Call, ...]
    prepare: Call | None = None


@dataclass(frozen=True)
class Stopwatch:
    """A way to time some work, with its warm-up behind it."""

    sample: Callable[[], float]
    """Seconds of one call, the mean over a few."""
    how: str
    """graph: replays of a CUDA graph; launches: one call after the other; single: one by one; wall: on a CPU."""


@contextlib.contextmanager
def own_stream(device: torch.device) -> Iterator[None]:
    """Make a new stream the current one; a CPU has none."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        outer, stream = torch.cuda.current_stream(), torch.cuda.Stream()
        stream.wait_stream(outer)
        with torch.cuda.stream(stream):
            yield
        outer.wait_stream(stream)


def stopwatch(work: Work, device: torch.device) -> Stopwatch:
    """Warm the work up and find the way to time it; what it compiles, it compiles here."""
    for call in [*work.calls, *work.calls]:
        if work.prepare is not None:
            work.prepare()
        call()
    harness.synchronize(device)
    if device.type != "cuda":
        return Stopwatch(partial(_wall_sample, work), "wall")
    if work.prepare is not None:
        return Stopwatch(partial(_single_sample, work), "single")
    seconds = _launches_sample(work.calls, 1)
    if seconds < GRAPH_BELOW:
        repeats = max(1, math.ceil(SAMPLE / (seconds * len(work.calls))))
        # work that waits for the device, or talks to another stream, cannot be captured
        with contextlib.suppress(Exception):
            graph = _captured(work.calls, repeats)
            return Stopwatch(partial(_graph_sample, graph, repeats * len(work.calls)), "graph")
        torch.cuda.synchronize(device)
    repeats = max(1, math.ceil(SAMPLE / (seconds * len(work.calls))))
    return Stopwatch(partial(_launches_sample, work.calls, repeats), "launches")


def interleave(watches: dict[str, Stopwatch], rounds: int) -> dict[str, list[float]]:
    """Sample every contender once a round, backwards on odd rounds so that none always follows the same one."""
    samples: dict[str, list[float]] = {name: [] for name in watches}
    for index in range(rounds):
        for name in list(watches) if index % 2 == 0 else list(reversed(watches)):
            samples[name].append(watches[name].sample())
    return samples


def summary(samples: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of some seconds, in milliseconds."""
    timing = harness.Timing.of([harness.Sample(seconds, None) for seconds in samples])
    return {"median_ms": timing.median_ms, "p20_ms": timing.p20_ms, "p80_ms": timing.p80_ms}


def _wall_sample(work: Work) -> float:
    total = 0.0
    for call in work.calls:
        if work.prepare is not None:
            work.prepare()
        start = time.perf_counter()
        call()
        total += time.perf_counter() - start
    return total / len(work.calls)


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _single_sample(work: Work) -> float:
    """`prepare` keeps the device busy while the call is being queued, so that no gap is timed."""
    start, end = _events()
    total = 0.0
    for call in work.calls:
        assert work.prepare is not None
        work.prepare()
        start.record()
        call()
        end.record()
        end.synchronize()
        total += start.elapsed_time(end)
    return total / 1e3 / len(work.calls)


def _launches_sample(calls: tuple[Call, ...], repeats: int) -> float:
    start, end = _events()
    calls[-1]()  # not timed: the device is busy when the clock starts
    start.record()
    for _ in range(repeats):
        for call in calls:
            call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / (repeats * len(calls))


def _graph_sample(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    start, end = _events()
    graph.replay()  # not timed, as above
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def _captured(calls: tuple[Call, ...], repeats: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    # the results of all sets stay alive, so that each set is written to memory of its own, not to the cache
    kept: deque[object] = deque(maxlen=len(calls))
    gc.collect()
    gc.disable()  # nothing of another graph may be destroyed during a capture
    try:
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            for _ in range(repeats):
                for call in calls:
                    kept.append(call())
    finally:
        gc.enable()
    return graph
