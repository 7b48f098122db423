"""Measuring tools shared by the benchmarks: interleaved timing, a quiet filter, peak memory, and the record.

Written for one host. Rank 0 reads the machine's load, so every rank must run on the machine that rank 0 sees.
The kernel counts load in ticks of 10 ms: steps of a second are judged well, of a few ticks badly.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
Step = Callable[[], object]

QUIET_CORES = 0.12  # other processes' use of the machine during a step, in cores, up to which it still counts
FEWEST_QUIET = 3


@dataclass(frozen=True)
class Sample:
    """One timed step: the slowest rank's seconds, and the cores others used meanwhile (None if unknown)."""

    seconds: float
    other_cores: float | None

    @property
    def quiet(self) -> bool:
        """Whether nothing else worth noticing ran; unknown counts as quiet."""
        return self.other_cores is None or self.other_cores < QUIET_CORES


@dataclass(frozen=True)
class Timing:
    """Milliseconds over the quiet samples, or over all of them where fewer than three were quiet."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    quiet: int
    total: int
    used_all: bool

    @classmethod
    def of(cls, samples: list[Sample]) -> Timing:
        """Summarise at least one sample."""
        quiet = [sample for sample in samples if sample.quiet]
        # A run shorter than three rounds is not noisy, only short.
        used_all = len(quiet) < min(FEWEST_QUIET, len(samples))
        chosen = samples if used_all else quiet
        times = torch.tensor([1e3 * sample.seconds for sample in chosen], dtype=torch.float64)
        p20, median, p80 = torch.quantile(times, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        return cls(median, p20, p80, len(quiet), len(samples), used_all)


def machine_busy_seconds() -> float | None:
    """CPU seconds this machine has spent on anything since boot, all cores; None without /proc/stat."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return None
    # user nice system idle iowait irq softirq steal; the guest columns after them are part of user already.
    ticks = [int(word) for word in first.split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def own_busy_seconds() -> float:
    """CPU seconds of this process, all threads."""
    times = os.times()
    return times.user + times.system


def synchronize(device: torch.device) -> None:
    """Wait for the device's queued work; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_step(step: Step | None, device: torch.device) -> Sample:
    """Time one step on all ranks; those with None sleep in the collective after it. Seconds agree on all."""
    synchronize(device)
    dist.barrier()
    busy, own, start = machine_busy_seconds(), own_busy_seconds(), time.perf_counter()
    if step is not None:
        step()
        synchronize(device)
    elapsed, own = time.perf_counter() - start, own_busy_seconds() - own
    mine = torch.tensor([elapsed, own], dtype=torch.float64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    window = time.perf_counter() - start
    after = machine_busy_seconds()
    seconds, own_total = max(float(rank[0]) for rank in everyone), sum(float(rank[1]) for rank in everyone)
    if busy is None or after is None:
        return Sample(seconds, None)
    return Sample(seconds, (after - busy - own_total) / window)


def seconds_alone(step: Step, device: torch.device) -> float:
    """Time one step of this process alone: by the device's own clock on CUDA, launches included."""
    synchronize(device)
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step()
    end.record()
    synchronize(device)
    return begin.elapsed_time(end) / 1e3


def run_rounds(steps: dict[str, Step | None], rounds: int, device: torch.device, label: str) -> dict[str, list[Sample]]:
    """Step every variant once a round, backwards on odd rounds so that none always follows the same one.

    Rank 0 prints a line per round, in milliseconds; a ~ marks a step during which other processes were busy.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in steps}
    for index in range(rounds):
        order = list(steps) if index % 2 == 0 else list(reversed(steps))
        latest = {name: timed_step(steps[name], device) for name in order}
        for name in steps:
            samples[name].append(latest[name])
        if dist.get_rank() == 0:
            marked = (f"{name} {1e3 * s.seconds:.1f}{'' if s.quiet else '~'}" for name, s in latest.items())
            print(f"{label} {index + 1}: {'  '.join(marked)}", flush=True)
    return samples


def in_fresh_process(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run `function` in a new interpreter and return its result; raises what it raised."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def release_memory(device: torch.device) -> None:
    """Give freed memory back, so that what building a model left behind is not counted as its step's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak from what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # 5 resets VmHWM, see proc(5)


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes since the reset: of the whole process (VmHWM) or of the CUDA allocator; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    kib = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
    return None if kib is None else kib * 1024


def peak_of_second(step: Step, device: torch.device) -> int | None:
    """Peak bytes during a step after a first one, which has made the lasting buffers; None if unknown."""
    for _ in range(2):
        release_memory(device)
        reset_peak_memory(device)
        step()
    synchronize(device)
    return peak_memory(device)


def join_group(store: str, rank: int, world_size: int, device: torch.device) -> None:
    """Form a default process group around a file, for processes that no launcher started."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def git_commit() -> str:
    """The checkout's commit, ending in -dirty if files differ from it; "unknown" outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def tuning_variables() -> dict[str, str]:
    """Environment settings that change the speed of the same code; preloaded libraries by file name only."""
    prefixes = ("MALLOC_", "MKL_", "OMP_", "KMP_", "DNNL_", "ONEDNN_", "NCCL_", "CUBLAS_")
    found = {key: value for key, value in sorted(os.environ.items()) if key.startswith(prefixes)}
    preloaded = os.environ.get("LD_PRELOAD", "").replace(":", " ").split()
    return found | ({"LD_PRELOAD": " ".join(Path(name).name for name in preloaded)} if preloaded else {})


def random_text(vocab: int, batch: int, seq: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random tokens and their targets, each (batch, seq), the same on every rank and device."""
    text = torch.randint(vocab, (batch, seq + 1), generator=torch.Generator().manual_seed(seed)).to(device)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def environment(module: str, device: torch.device) -> dict[str, Any]:
    """Where and how a benchmark ran, for the record; `module` is the name that torchrun or python was given."""
    launched = dist.is_initialized()
    launcher = f"{f'torchrun --nproc-per-node {dist.get_world_size()}' if launched else 'python'} -m {module}"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model(),
        "backend": dist.get_backend() if launched else None,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads_per_rank": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "variables": tuning_variables(),
        "command": shlex.join([*shlex.split(launcher), *sys.argv[1:]]),
        "commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(partial, path)
