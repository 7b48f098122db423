"""The planner's step times beside measured ones on this CPU, or beside published ones of large runs.

python -m benchmarks.planner                # calibrates 20 s, then measures layouts on 1, 2 and 4 processes
python -m benchmarks.planner --published    # published tables; nothing is run
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks import harness, planner_published
from benchmarks.planner_layouts import BATCH, MODEL, SEQ_LEN, Case, cases
from benchmarks.planner_picture import plot
from tpformer.planner.calibrate import calibrate
from tpformer.planner.candidate import Candidate
from tpformer.planner.cost import Machine
from tpformer.planner.machine import Device
from tpformer.planner.search import Plan, planned

CLOSE = 0.20
"""Of the measured time: what is aimed at on a calibrated CPU."""
APART = 0.10
"""Layouts whose measured times lie closer than this have no order to agree with."""


@dataclass(frozen=True)
class Options:
    """Compare the planner's step times with measured or published ones."""

    published: bool = False
    """Large runs' published times instead of this machine's."""
    rounds: int = 5
    """Timed steps of each layout."""
    processes: tuple[int, ...] = (1, 2, 4)
    """On how many processes to measure."""
    seconds: float = 20.0
    """Of calibration."""
    machine: Path | None = None
    """A machine that `tpformer calibrate` wrote, instead of calibrating."""
    output: Path | None = None
    """Where the record goes; by default benchmarks/results/planner_cpu.json, or planner_published.json."""


@dataclass(frozen=True)
class Measured:
    """A layout, predicted and measured."""

    case: Case
    plan: Plan
    timing: harness.Timing

    @property
    def seconds(self) -> float:
        """Measured: the median."""
        return self.timing.median_ms / 1e3

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.plan.seconds / self.seconds


def predict(case: Case, machine: Device) -> Plan:
    """What the planner says of a layout."""
    candidate = Candidate(MODEL, case.parallel, SEQ_LEN, BATCH, case.micro_batch_size, on_cpu=True)
    return planned(candidate, Machine(machine, machine.link))


def measure(processes: int, rounds: int) -> dict[str, list[harness.Sample]]:
    """Samples of every layout on so many processes, which torchrun starts. Raises RuntimeError if they fail."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "samples.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [*torchrun, "-m", "benchmarks.planner_steps", str(rounds), str(output)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        found = json.loads(output.read_text())["samples"]
    return {name: [harness.Sample(**sample) for sample in taken] for name, taken in found.items()}


def order(found: Sequence[Measured]) -> tuple[int, int]:
    """Of pairs of layouts on as many processes, measured clearly apart: in how many the prediction agrees; how many."""
    agree = pairs = 0
    for a, b in itertools.combinations(found, 2):
        if a.case.processes == b.case.processes and abs(a.seconds / b.seconds - 1) > APART:
            pairs += 1
            agree += (a.seconds < b.seconds) == (a.plan.seconds < b.plan.seconds)
    return agree, pairs


def table(found: Sequence[Measured]) -> str:
    """A line a layout, then how many are close and whether the order agrees."""
    head = f"{'processes':>9} {'layout':52} {'measured ms':>11} {'predicted':>10} {'ratio':>6}"
    lines = [head]
    for one in found:
        missed = "" if abs(one.ratio - 1) <= CLOSE else "  missed"
        lines.append(
            f"{one.case.processes:>9} {one.case.name:52} {one.timing.median_ms:>11.1f}"
            f" {1e3 * one.plan.seconds:>10.1f} {one.ratio:>6.2f}{missed}"
        )
    agree, pairs = order(found)
    close = sum(abs(one.ratio - 1) <= CLOSE for one in found)
    return "\n".join(
        [
            *lines,
            "",
            f"{close} of {len(found)} layouts within {CLOSE:.0%} of the measured",
            f"order: {agree} of {pairs} pairs on as many processes that lie more than {APART:.0%} apart",
        ]
    )


def compare_measured(options: Options) -> dict[str, Any]:
    """Calibrate, measure and compare."""
    machine = Device.from_json(options.machine.read_text()) if options.machine else calibrate(options.seconds)
    found = []
    for processes in options.processes:
        samples = measure(processes, options.rounds)
        for case in cases(processes):
            found.append(Measured(case, predict(case, machine), harness.Timing.of(samples[case.name])))
    print(table(found))
    agree, pairs = order(found)
    return {
        "machine": json.loads(machine.to_json()),
        "layouts": [
            {
                "layout": one.case.name,
                "processes": one.case.processes,
                "measured": vars(one.timing),
                "predicted_ms": 1e3 * one.plan.seconds,
                "ratio": one.ratio,
            }
            for one in found
        ],
        "order": {"agree": agree, "pairs": pairs},
    }


def compare_published() -> dict[str, Any]:
    """Predict every published row."""
    found = planner_published.compare()
    print(planner_published.table(found))
    return {"rows": planner_published.record(found)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the flags, compare, print, and write the record and its picture."""
    options = tyro.cli(Options, prog="benchmarks.planner", args=arguments)
    name = "planner_published" if options.published else "planner_cpu"
    output = options.output or Path(f"benchmarks/results/{name}.json")
    comparison = compare_published() if options.published else compare_measured(options)
    environment = harness.environment("benchmarks.planner", torch.device("cpu"))
    harness.write_json(output, {"schema_version": 1, "benchmark": "planner", "environment": environment} | comparison)
    plot(output.with_suffix(".png"), comparison)
    print(f"written to {output}, with a picture beside it")


if __name__ == "__main__":
    main()
