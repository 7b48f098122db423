"""How well it scales: one model on 1, 2, 4 processes, over tensor, pipeline and data parallelism, beside its peers.

    python -m benchmarks.scaling --preset cpu-small
    python -m benchmarks.scaling --preset peers --axes tp dp --mode strong
    python -m benchmarks.scaling --preset megatron-2019 --mode weak --project tp=2 tp=4 tp=8 --network nvlink4

It launches its own torchrun for every layout; no launcher is needed. A step is forward, backward and the sums of the
gradients, without an optimizer, the same for all kinds; all that have the same model and batch must have the same
loss and the same gradient of the first norm before they are timed. Efficiency is the FLOP/s of each rank over those of
the same kind's one process (strong scaling: t1 / (n tn)). A step takes as long as its slowest rank.

--project runs one rank's true share on the one device at hand, with collectives that send nothing, measures it, and
adds what the communication would take on --network: such rows and plots say PROJECTED.
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from benchmarks import harness, scaling_plots, scaling_report
from benchmarks.scaling_jobs import AxisName, Mode, Wish, jobs_of, plan
from benchmarks.scaling_launch import Launch
from benchmarks.scaling_measure import Effort, measure
from benchmarks.scaling_presets import PRESETS
from benchmarks.scaling_record import row_of, series_of
from tpformer.planner.hardware import link
from tpformer.planner.machine import Link

PEAK_IS = {"cpu": "resident memory of the whole process, torch included", "cuda": "torch.cuda.max_memory_allocated"}


@dataclass(frozen=True)
class Options:
    """Measure strong and weak scaling over tp, pp and dp; writes a record, a table and plots."""

    preset: Literal["cpu-tiny", "cpu-small", "megatron-2019", "megatron-2020", "llama3-8b", "llama3-70b", "peers"] = (
        "cpu-small"
    )
    """Models and batch; cpu-small takes 3 minutes on 2 cores, megatron's and llama3's are for GPUs."""
    kinds: tuple[str, ...] = ()
    """tpformer, tpformer_sp (sequence parallel), tpformer_fsdp, modules of benchmarks.peers; default: the preset's."""
    axes: tuple[AxisName, ...] = ("tp", "pp", "dp")
    """Axes to split over, each by itself; a peer has one."""
    degrees: tuple[int, ...] = ()
    """How many processes; default: those of the preset for which there are cores or GPUs."""
    mode: Literal["strong", "weak", "both"] = "both"
    """strong: the model stays; weak: it grows with tp and pp, the batch with dp."""
    project: tuple[str, ...] = ()
    """Degrees that one process stands for, as tp=8 or dp=8."""
    network: str = "nvlink4"
    """Between the ranks of what is projected; a name of the planner's table."""
    device: Literal["cuda", "cpu"] = "cuda" if torch.cuda.is_available() else "cpu"
    """What the processes compute on."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of weights and activations; by default bfloat16 on CUDA and float32 on a CPU."""
    rounds: int = 5
    """Timed steps of each job, in each pass."""
    warmup: int = 1
    """Untimed steps before those, besides the ones that are looked at."""
    together: bool = True
    """All jobs stay alive and take turns; otherwise one after the other, where not all models fit beside each other."""
    passes: int = 2
    """Of one after the other."""
    threads: int = 1
    """CPU threads of each process."""
    timeout: float = 120.0
    """Seconds in which every step, and every start, must end."""
    results: Path = Path("benchmarks/results")
    """Where scaling_<preset>_<device>.json and the plots are written."""

    @property
    def stem(self) -> Path:
        """The record's path, without its ending."""
        return self.results / f"scaling_{self.preset}_{self.device}"

    def wish(self) -> Wish:
        """What of the preset to measure. Raises ValueError for a projection that cannot be."""
        preset = PRESETS[self.preset]
        projected = tuple(projection(text) for text in self.project)
        places = torch.cuda.device_count() if self.device == "cuda" else os.cpu_count() or 1
        modes: tuple[Mode, ...] = ("strong", "weak") if self.mode == "both" else (self.mode,)
        axes = tuple(dict.fromkeys(axis for axis, _ in projected)) if projected else self.axes
        return Wish(
            kinds=self.kinds or preset.kinds,
            axes=axes,
            degrees=self.degrees or ((1,) if projected else tuple(n for n in preset.degrees if n <= places)),
            modes=modes,
            dtype=self.dtype or ("bfloat16" if self.device == "cuda" else "float32"),
            projected=projected,
        )


def projection(text: str) -> tuple[AxisName, int]:
    """An axis and its degree. Raises ValueError for what is neither, or cannot be projected."""
    axis, _, degree = text.partition("=")
    if axis == "pp":
        raise ValueError(f"project ({text}): a pipeline's rank waits for its neighbours, which one process cannot show")
    if axis not in ("tp", "dp") or not degree.isdecimal() or int(degree) < 2:
        raise ValueError(f"project ({text}) must be tp=<n> or dp=<n>, of at least 2")
    return ("tp" if axis == "tp" else "dp"), int(degree)


def run(options: Options) -> dict[str, Any]:
    """Measure, and return the record. Raises ValueError for options that do not fit."""
    preset, wish = PRESETS[options.preset], options.wish()
    network: Link | None = link(options.network) if wish.projected else None
    series = plan(preset, wish)
    jobs = jobs_of(series)
    effort = Effort(options.rounds, options.warmup, min(3, options.rounds), options.together, options.passes)
    launch = Launch(options.device, options.threads, options.timeout)
    measured = measure(jobs, effort, launch, lambda line: print(line, flush=True))
    rows = [row_of(one, network) for one in measured]
    return {
        "schema_version": 1,
        "benchmark": "scaling",
        "config": asdict(options) | {"results": str(options.results)},
        "environment": harness.environment("benchmarks.scaling", torch.device(options.device)),
        "quiet_below_cores": harness.QUIET_CORES,
        "peak_memory_is": PEAK_IS[options.device],
        "network": None if network is None else asdict(network),
        "jobs": rows,
        "series": series_of(series, jobs, rows, preset.published),
    }


def main() -> None:
    """Read the flags, measure, print and write."""
    options = tyro.cli(Options, prog="benchmarks.scaling")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("benchmarks.scaling: ended from outside"))  # jobs end with it
    try:
        record = run(options)
    except ValueError as error:
        sys.exit(f"benchmarks.scaling: error: {error}")
    harness.write_json(options.stem.with_suffix(".json"), record)
    print("\n".join(["", *scaling_report.table(record)]))
    written = scaling_plots.write(options.stem, record)
    print(f"written to {options.stem}.json" + "".join(f", {path.name}" for path in written))


if __name__ == "__main__":
    main()
